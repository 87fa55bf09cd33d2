"""A vision-language model that runs here: any that transformers loads as image-text-to-text.

Prompts of a batch are padded on the left, so that every answer begins where its prompt ends.
"""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hdl.caption.question import Answer, Question, picture
from hdl.caption.settings import Settings
from hdl.data.images import Skip
from hdl.errors import HdlError


def device_for(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU where there is none. HdlError where there are fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise HdlError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start torchrun "
            "with --nproc_per_node at most that"
        )
    return torch.device("cuda", local_rank)


class LocalModel:
    """HdlError where the model or its processor cannot be loaded, or cannot be asked about an image."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        check_name(settings.model)
        if settings.bits and device.type != "cuda":
            raise HdlError(
                "--bits 4 needs a GPU (bitsandbytes' nf4), and this machine has none; leave it out"
            )
        from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        try:
            self.processor: Any = AutoProcessor.from_pretrained(settings.model)
            check_processor(self.processor, settings.model)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                settings.model,
                dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
                device_map={"": device},
                quantization_config=nf4 if settings.bits else None,
            )
        except torch.OutOfMemoryError:
            raise HdlError(
                f"{settings.model}: does not fit the GPU's memory; try --bits 4, or a smaller model"
            ) from None
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise cannot_load(settings.model, error) from error
        self.settings, self.device = settings, device
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.generation = generation_config(self.model.generation_config, settings)
        self.generation.pad_token_id = self.tokenizer.pad_token_id
        ends = self.generation.eos_token_id
        self.ends = torch.tensor(ends if ends is not None else self.tokenizer.eos_token_id).reshape(-1)

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer | Skip]]:
        """In batches of batch_size, each drawn from the seed of its first question."""
        left = iter(questions)
        while asked := list(islice(left, self.settings.batch_size)):
            good: list[tuple[Question, Image.Image]] = []
            for question in asked:
                try:
                    good.append((question, picture(question.path, self.settings.max_side)))
                except Skip as skip:
                    yield question, skip
            if good:
                batch, pictures = zip(*good)
                yield from zip(
                    batch, self.answer(pictures, [question.prompt for question in batch], batch[0].seed)
                )

    @torch.inference_mode()
    def answer(self, pictures: tuple[Image.Image, ...], prompts: list[str], seed: int) -> list[Answer]:
        """One forward after another until every row has ended. HdlError where the batch does not fit."""
        texts = [self._chat(prompt) for prompt in prompts]
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=[[picture] for picture in pictures],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and texts[0].startswith(bos)),  # templates often write it themselves
        ).to(self.device, dtype=self.model.dtype)
        torch.manual_seed(seed)
        try:
            rows = self.model.generate(**inputs, generation_config=self.generation)
        except torch.OutOfMemoryError:
            raise HdlError(
                f"a batch of {len(prompts)} does not fit the GPU's memory; lower --batch-size or --max-side, or use "
                "--bits 4, and run again: finished captions are kept"
            ) from None
        rows = rows[:, inputs["input_ids"].shape[1] :].cpu()
        cut = ~torch.isin(rows, self.ends).any(1)
        words = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Answer(text, bool(c)) for text, c in zip(words, cut)]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


def generation_config(published: Any, settings: Settings) -> Any:
    """The model's own, with our length and temperature; its top_k and top_p count only when sampling."""
    config = copy.deepcopy(published)
    config.max_new_tokens, config.max_length = settings.max_new_tokens, None
    config.do_sample = settings.temperature > 0
    config.temperature = settings.temperature or None
    if not config.do_sample:
        config.top_k = config.top_p = config.min_p = None
    return config


def check_name(model: str) -> None:
    """HdlError for a folder that is not there or holds no model, and for a name that the hub does not give."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HdlError(f"{model}: no config.json there; expected a folder that transformers can load")
    elif path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise HdlError(f"{model}: no such folder; expected a model's folder or its name on the hub")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError

        try:  # once: AutoProcessor would wait for a hub that is out of reach at each of its files
            hf_hub_download(model, "config.json")
        except GatedRepoError:
            raise HdlError(
                f"{model}: its owner asks for consent: accept the terms on the hub's page of it, then run "
                "hf auth login; or give a folder that holds it"
            ) from None
        except (OSError, ValueError) as error:
            raise cannot_load(model, error) from error


def check_processor(processor: Any, model: str) -> None:
    missing = [
        part
        for part in ("tokenizer", "image_processor", "chat_template")
        if not getattr(processor, part, None)
    ]
    if missing:
        raise HdlError(
            f"{model}: its processor has no {' and no '.join(missing)}; expected an instruct model that takes images"
        )


def cannot_load(model: str, error: Exception) -> HdlError:
    said = " ".join(str(error).split())[:400]
    if "torchvision" in said.lower():
        return HdlError(
            f"{model}: its processor needs torchvision, which is not here or not the one that goes with torch "
            f"{torch.__version__}: in hdl's folder, pip install -c constraints.txt -e '.[caption]'"
        )
    return HdlError(
        f"{model}: cannot be loaded as an image-text-to-text model: {said or type(error).__name__}. Give a folder or a "
        "hub name that transformers can load here, or --server"
    )
