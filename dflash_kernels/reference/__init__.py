"""Every op in plain torch: the specification, and what runs where no kernel is built.

Arithmetic is float32 inside; given float64 tensors it is float64 throughout, which is how tests obtain the truth that
float32 results are measured against.
"""

from . import activation as activation
from . import attention as attention
from . import block as block
from . import context as context
from . import conv as conv
from . import experts as experts
from . import int4 as int4
from . import linear as linear
from . import lm_head as lm_head
from . import norm as norm
from . import quant as quant
from . import quant_gpu as quant_gpu
from . import rope as rope
from . import router as router
from . import sample as sample
from . import selector as selector
from . import verify as verify
