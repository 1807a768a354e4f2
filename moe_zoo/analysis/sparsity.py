"""How few experts tokens need, alone and together with their neighbours (BlockFFN, arXiv 2507.08771, section 4).

    TLS   = 1 - mean over tokens |S_t| / E                                  token-level sparsity
    CLS_L = 1 - mean over chunks |union of S_t over L tokens| / E           chunk-level sparsity; CLS_1 = TLS
    reuse = mean over tokens |S_t and S_{t+1}| / |S_t|                      how much the next token needs again

S_t are the experts that token t is sent to, before any drop. Chunks are L consecutive places of a row: decoding L
tokens at once loads the union. CLS_L <= TLS, and where rows are whole chunks it does not rise when L doubles.

All functions take numpy or JAX arrays, B rows of S tokens and E experts, and return (sum, count): both add up over
batches and the statistic is one over the other. `valid` False is padding.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

#: L of the paper's CLS, as many tokens as its speculative decoding drafts
CHUNK = 8

Sum = tuple[Float[Array, ""], Float[Array, ""]]


def chunk_sparsity(active_BSE: Bool[Array, "B S E"], valid_BS: Bool[Array, "B S"], length: int = CHUNK) -> Sum:
    """CLS of `length`; 1 gives TLS. What remains of a row, and chunks with padding in them, are left out; documents may
    meet in a chunk, as in the authors' code.
    """
    B, S, E = active_BSE.shape
    whole = S - S % length
    cut = lambda x: x[:, :whole].reshape(B, whole // length, length, *x.shape[2:])
    union_BN = cut(active_BSE).any(2).sum(-1)
    counts_BN = cut(valid_BS).all(2)
    return ((1 - union_BN / E) * counts_BN).sum(), counts_BN.sum()


def reuse(active_BSE: Bool[Array, "B S E"], paired_BS: Bool[Array, "B S-1"]) -> Sum:
    """The share of a token's experts that the next one needs too. `paired`: whether place s + 1 goes on with the
    document of place s. Tokens without experts are left out.
    """
    now_BSE, then_BSE = active_BSE[:, :-1], active_BSE[:, 1:]
    size_BS, both_BS = now_BSE.sum(-1), (now_BSE & then_BSE).sum(-1)
    counts_BS = paired_BS & (size_BS > 0)
    return (both_BS / (size_BS + (size_BS == 0)) * counts_BS).sum(), counts_BS.sum()
