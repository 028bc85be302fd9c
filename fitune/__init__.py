"""fitune: fine-tune Llama 3, 70B above all, on the GPUs you own."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 it asks at import for a package that would download a kernel, which fitune does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
