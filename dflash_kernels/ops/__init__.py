"""Public ops, one file per noun: contract, checks, schema, and the bytes and operations that a call must cost."""

from . import head as head
from . import linear as linear
from . import norm as norm
