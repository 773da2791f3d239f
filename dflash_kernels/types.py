"""Records that the ops take and return in one step."""

from dataclasses import dataclass

import torch

from .limits import check_size


@dataclass(frozen=True, eq=False)
class PreparedBlock:
    """The inputs of one draft or target pass over B blocks of Q tokens. `prepare_block` writes them.

    Parameters
    ----------
    ids : (B, Q) int64
        [anchor, MASK, MASK, ...].
    positions : (B, Q) int64
        Absolute positions.
    slots : (B, Q) int64, optional
        Where each token's K and V belong in the paged cache; -1: nowhere. None without a page table.
    rows : (B, Q, H) dtype of the embedding, optional
        Embedded ids. None without an embedding table.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import PreparedBlock
    >>> block = PreparedBlock(ids=torch.empty(2, 8, dtype=torch.int64), positions=torch.empty(2, 8, dtype=torch.int64))
    >>> block.slots is None and block.rows is None
    True
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    def empty(cls, requests: int, block: int, *, device: str | torch.device | None = None, slots: bool = True,
              hidden: int = 0, dtype: torch.dtype = torch.bfloat16) -> "PreparedBlock":
        """Memory for prepare_block to write into, at fixed addresses.

        Parameters
        ----------
        requests, block : int
            B and Q.
        device : str or torch.device, optional
            None: torch's default device.
        slots : bool
            Whether there are slots, as with a page table.
        hidden : int
            H of the embedded rows. 0: no rows, as without an embedding table.
        dtype : torch.dtype
            Of the rows: the embedding table's.

        Returns
        -------
        PreparedBlock
            With unspecified values.

        Raises
        ------
        TypeError, ValueError
            A size that is no int, or below 0, or below 1 for block.

        Examples
        --------
        >>> from dflash_kernels import PreparedBlock
        >>> PreparedBlock.empty(2, 8).ids.shape
        torch.Size([2, 8])
        """
        op = "PreparedBlock.empty"
        shape = (check_size(op, "requests", requests, 0), check_size(op, "block", block, 1))
        hidden = check_size(op, "hidden", hidden, 0)
        ids, positions = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        return cls(ids, positions, torch.empty(shape, dtype=torch.int64, device=device) if slots else None,
                   torch.empty((*shape, hidden), dtype=dtype, device=device) if hidden else None)


@dataclass(frozen=True, eq=False)
class Verified:
    """The accepted part of B drafted blocks. `verify_greedy` and `verify_sample` write it.

    Parameters
    ----------
    accept_lens : (B,) int32
        Accepted drafts, 0 to Q - 1.
    commit_lens : (B,) int32
        Emitted tokens: the accepted ones and the bonus. 0 for a padded request.
    tokens : (B, Q) int64
        The emitted tokens, then -1.
    bonus : (B,) int64
        The last emitted token, which is the target's own and the next block's anchor. -1 for a padded request.
    new_lens : (B,) int32
        Context lengths after the step.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import verify_greedy
    >>> drafts, lengths = torch.tensor([[5, 7, 8]]), torch.tensor([10], dtype=torch.int32)
    >>> verified = verify_greedy(drafts, torch.tensor([[7, 9, 4]]), lengths)
    >>> verified.commit_lens.tolist(), verified.bonus.tolist()
    ([2], [9])
    """

    accept_lens: torch.Tensor
    commit_lens: torch.Tensor
    tokens: torch.Tensor
    bonus: torch.Tensor
    new_lens: torch.Tensor

    @classmethod
    def empty(cls, requests: int, block: int, *, device: str | torch.device | None = None) -> "Verified":
        """Memory for verify_greedy and verify_sample to write into, at fixed addresses.

        Parameters
        ----------
        requests, block : int
            B and Q.
        device : str or torch.device, optional
            None: torch's default device.

        Returns
        -------
        Verified
            With unspecified values.

        Raises
        ------
        TypeError, ValueError
            A size that is no int, or below 0, or below 1 for block.

        Examples
        --------
        >>> from dflash_kernels import Verified
        >>> Verified.empty(2, 8).tokens.shape
        torch.Size([2, 8])
        """
        op = "Verified.empty"
        b, q = check_size(op, "requests", requests, 0), check_size(op, "block", block, 1)
        accept_lens, commit_lens, new_lens = (torch.empty(b, dtype=torch.int32, device=device) for _ in range(3))
        tokens = torch.empty((b, q), dtype=torch.int64, device=device)
        return cls(accept_lens, commit_lens, tokens, torch.empty(b, dtype=torch.int64, device=device), new_lens)


@dataclass(frozen=True, eq=False)
class SamplingTensors:
    """Sampling settings of B requests. All are contiguous, on the logits' device.

    Parameters
    ----------
    temperature : (B,) float32
        Below 1e-5 the request is greedy.
    seeds : (B,) int64
        A request's text depends on its own seed.
    top_k : (B,) int32, optional
        0, or at least V: off.
    top_p : (B,) float32, optional
        1 or more: off. 0: only the most likely token is kept, and those that tie with it.
    min_p : (B,) float32, optional
        0: off.

    Notes
    -----
    None is off for every request. The equations are in ops/sample.py.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import SamplingTensors
    >>> params = SamplingTensors(torch.tensor([0.0, 0.7]), torch.tensor([1, 2]), top_p=torch.tensor([1.0, 0.9]))
    >>> params.top_k is None
    True
    """

    temperature: torch.Tensor
    seeds: torch.Tensor
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """The distribution q that each draft was drawn from, in one of three forms.

    Parameters
    ----------
    probs : (B, Q - 1, K) or (B, Q - 1, V) float32, optional
        With ids: sparse, K tokens per draft; every other token has probability 0. Alone: dense.
    ids : (B, Q - 1, K) int64, optional
        The tokens of sparse probs, distinct in a row. A negative id is unused.
    logits : (B, Q - 1, V) float32, bfloat16 or float16, optional
        Without probs: dense, q = softmax(logits / temperature of the request).

    Notes
    -----
    Last dimensions are contiguous.

    Examples
    --------
    >>> import torch
    >>> from dflash_kernels import Proposal
    >>> sparse = Proposal(probs=torch.tensor([[[0.75, 0.25]]]), ids=torch.tensor([[[30, 8]]]))
    >>> dense = Proposal(logits=torch.zeros(1, 1, 100))
    >>> sparse.logits is None and dense.probs is None
    True
    """

    probs: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogitAdjustments:
    """Changes to the target's logits before sampling. They apply in the order of the parameters; None is left out.

    Parameters
    ----------
    seen : (B, Q, ceil(V / 32)) int32, optional
        Bit mask of the tokens that repetition_penalty changes.
    repetition_penalty : (B,) float32, optional
        A seen token's logit is divided by it if positive, otherwise multiplied. Given exactly when seen is. Contiguous.
    bias : (B, Q, V) float32, optional
        Added: logit bias, presence and frequency penalties.
    bitmask : (B, Q, ceil(V / 32)) int32, optional
        A token with bit 0 cannot be drawn: a grammar's mask, as xgrammar packs it.

    Notes
    -----
    Token v has bit v % 32 of word v // 32. Only the last dimension must be contiguous, so one row for a whole block is
    an expanded view, not a copy.

    Examples
    --------
    This mask allows tokens 0 and 2 at all four positions of a block.

    >>> import torch
    >>> from dflash_kernels import LogitAdjustments
    >>> words = torch.tensor([0b101], dtype=torch.int32)
    >>> LogitAdjustments(bitmask=words.expand(1, 4, 1)).bitmask.shape
    torch.Size([1, 4, 1])
    """

    seen: torch.Tensor | None = None
    repetition_penalty: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bitmask: torch.Tensor | None = None
