import logging

# PEFT imports bitsandbytes, which warns on machines without a GPU that it has no fast 4-bit kernel for the CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
