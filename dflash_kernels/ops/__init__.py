"""Public ops, one file per noun: contract, checks, schema, and the bytes and operations that a call must cost."""

from . import activation as activation
from . import attention as attention
from . import block as block
from . import context as context
from . import linear as linear
from . import lm_head as lm_head
from . import norm as norm
from . import rope as rope
from . import sample as sample
from . import verify as verify
