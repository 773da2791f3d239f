"""Public ops, one file per noun: contract, checks, schema, and the bytes and operations that a call must cost."""

from . import block as block
from . import norm as norm
from . import verify as verify
