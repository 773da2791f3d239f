"""Public ops, one module per noun.

These rules hold for every op:

- Arguments are checked before anything is written. The message reads `op: name must be EXPECTED; got GOT`.
- `DFLASH_CHECK=1` also checks values in tensors, such as lengths, page ids and positions. Reading them waits for the
  device, so no step is recorded then.
- Outputs can be passed in, for fixed addresses. An output that is None is allocated.
- A graph-safe op reads lengths, tables and tokens from tensors when it runs, so a captured launch can be replayed with
  new values.
- Cost is what a call must read and write, each byte once, with e, c and w bytes an element. Optional tensors that are
  not in the formula add their own bytes. Launches count kernels.
- No op has a gradient: fresh outputs require none, even if the inputs do. What an op writes in place keeps what
  autograd knew of it, which is then wrong; call those under `torch.no_grad()`.
"""

from . import activation as activation
from . import attention as attention
from . import block as block
from . import context as context
from . import conv as conv
from . import experts as experts
from . import linear as linear
from . import lm_head as lm_head
from . import norm as norm
from . import rope as rope
from . import router as router
from . import sample as sample
from . import selector as selector
from . import verify as verify
