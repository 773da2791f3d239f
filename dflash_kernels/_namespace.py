"""Where this copy of the library registers its ops, and the module of its C++ library.

A copy for the Hugging Face hub has another file in this one's place (tools/hub), so that several fit in a process.
"""

OPS = "dflash"
NATIVE = "._C"
