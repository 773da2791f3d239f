"""Public ops, one file per noun: contract, checks, schema, and the bytes and operations that a call must cost."""

from . import activation as activation
from . import context as context
from . import norm as norm
from . import rope as rope
