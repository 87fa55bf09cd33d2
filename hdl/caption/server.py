"""A vision-language model behind an OpenAI-compatible server (vLLM, llama.cpp): several requests at once.

What may pass (429, 5xx, a timeout, a lost connection) is tried again. What concerns one image is that image's Skip;
a server that is gone, or does not know the model, ends the run.
"""

import base64
import io
import os
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

import httpx2 as httpx

from hdl.caption.question import Answer, Question, picture
from hdl.caption.settings import Settings
from hdl.data.images import Skip
from hdl.errors import HdlError

TRIES = 5
BACKOFF = 1.0  # seconds before the second try; doubled before each further one
SECONDS = 600.0  # for one answer


class Server:
    """HdlError where the server cannot be reached, refuses the key, or does not have the model."""

    def __init__(self, settings: Settings) -> None:
        assert settings.server
        self.settings, self.url = settings, settings.server.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        try:
            self.client = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(SECONDS, connect=10),
                limits=httpx.Limits(max_connections=settings.batch_size),
            )
            response = self._send("GET", "/models")
        except httpx.InvalidURL as error:
            raise HdlError(
                f"--server {self.url}: no URL ({error}); expected one as http://localhost:8000/v1"
            ) from None
        except UnicodeEncodeError:
            raise HdlError("OPENAI_API_KEY: holds letters that no key has; expected plain ASCII") from None
        if response.status_code != 200:
            raise self._error(response, "expected the list of models; give the URL up to and with /v1")
        try:
            models = [str(model["id"]) for model in self._json(response)["data"]]
        except (KeyError, TypeError):
            raise self._error(response, "expected a list of models") from None
        if settings.model not in models:
            raise HdlError(
                f"{self.url}: has no model {settings.model!r}, only {', '.join(map(repr, models)) or 'none'}; give one "
                "of them as --model"
            )

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer | Skip]]:
        """In the order in which answers come."""
        with ThreadPool(self.settings.batch_size) as pool:  # its threads do not outlive an interrupted run
            yield from pool.imap_unordered(self._ask, questions)

    def _ask(self, question: Question) -> tuple[Question, Answer | Skip]:
        try:
            return question, self._answer(question)
        except Skip as skip:
            return question, skip

    def _answer(self, question: Question) -> Answer:
        settings = self.settings
        url = {"url": data_url(question, settings.max_side)}
        content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": question.prompt}]
        response = self._send(
            "POST",
            "/chat/completions",
            {
                "model": settings.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": settings.max_new_tokens,
                "temperature": settings.temperature,
                "seed": question.seed % 2**31,
            },
        )
        if response.status_code in (401, 403, 404):
            raise self._error(response, "expected an answer; check the URL, --model and OPENAI_API_KEY")
        if response.status_code != 200:
            raise Skip("server error", f"the server answered {told(response)}")
        try:
            choice = self._json(response)["choices"][0]
            return Answer(_said(choice["message"]["content"]), choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(response, "expected a chat completion") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The last response of up to TRIES. HdlError where there is none."""
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            wait = BACKOFF * 2**attempt
            try:
                response = self.client.request(method, self.url + path, json=body)
            except httpx.HTTPError as error:
                if last or body is None:
                    raise HdlError(
                        f"{self.url}: the server does not answer ({error or type(error).__name__}); start it or check "
                        "the URL, and run again: finished captions are kept"
                    ) from None
            else:
                if last or (response.status_code != 429 and response.status_code < 500):
                    return response
                told_to = response.headers.get("retry-after", "")
                wait = max(wait, min(float(told_to), 60.0)) if told_to.isdecimal() else wait
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise self._error(response, "expected JSON") from None

    def _error(self, response: httpx.Response, expected: str) -> HdlError:
        return HdlError(f"{self.url}: the server answered {told(response)}; {expected}")


def _said(content: str | list[dict[str, str]] | None) -> str:
    """A message's text, which may come in parts. TypeError where it is something else."""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    if not isinstance(content, str | None):
        raise TypeError(content)
    return content or ""


def told(response: httpx.Response) -> str:
    return f"{response.status_code}: {' '.join(response.text.split())[:200]!r}"


def data_url(question: Question, max_side: int) -> str:
    """The image as the request carries it. Raises Skip."""
    file = io.BytesIO()
    picture(question.path, max_side).save(file, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
