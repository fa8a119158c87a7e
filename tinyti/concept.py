"""A learned word and its vectors, the only parameters that Textual Inversion trains."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def word_length(table: Tensor) -> float:
    """The length of a real word's row in a vocabulary table (V, D): the 95th percentile of all rows.

    Most rows of a small or partly trained table belong to no word and are shorter.
    """
    return table.detach().float().norm(dim=-1).quantile(0.95).item()


class Concept(nn.Module):
    """A learned word: its `name`, its fp32 `vectors` (n, D), and their n consecutive token `ids`."""

    def __init__(self, name: str, vectors: Tensor, ids: list[int]):
        super().__init__()
        assert vectors.ndim == 2 and ids == list(range(ids[0], ids[0] + len(vectors)))
        self.name = name
        self.ids = ids
        self.vectors = nn.Parameter(vectors.detach().to(torch.float32, copy=True))

    @staticmethod
    def initial(rows: Tensor, n: int = 1, seed: int = 0) -> Tensor:
        """Initial vectors (n, D) from m rows of the vocabulary table (m, D), in their order.

        With m ≥ n each vector is the mean of its share of neighbouring rows.  With m < n several vectors take
        one row; all but the first are moved by a tenth of its length in a random direction, so no two start
        equal.  ValueError for no rows, for numbers that are not finite, or for n < 1.
        """
        if n < 1 or rows.ndim != 2 or not len(rows) or not rows.isfinite().all():
            found = f"{n} vectors from rows of shape {tuple(rows.shape)}"
            raise ValueError(f"{found}; expected at least 1 from (m, D) finite numbers")
        m, rows = len(rows), rows.detach().float()
        if m >= n:
            bounds = [i * m // n for i in range(n + 1)]
            return torch.stack([rows[a:b].mean(dim=0) for a, b in pairwise(bounds)])  # (n, D)
        sources = [i * m // n for i in range(n)]  # the row that each vector starts from
        vectors = rows[sources]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(vectors.shape, generator=generator, device="cpu", dtype=torch.float32)
        noise = noise.to(rows.device)
        noise = 0.1 * vectors.norm(dim=-1, keepdim=True) * F.normalize(noise, dim=-1)
        for i, (before, source) in enumerate(pairwise(sources), 1):
            if source == before:
                vectors[i] += noise[i]
        return vectors

    def insert(self, embeds: Tensor, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return `embeds` (B, T, D) with the word's vectors in the places of its ids in `ids` (B, T).

        `vectors` (B, n, D), one copy per sample, replace the word's own, so each sample has its own gradient.
        Out of place, in the dtype of `embeds`.
        """
        vectors = self.vectors if vectors is None else vectors
        mine = torch.arange(self.ids[0], self.ids[-1] + 1, device=ids.device)
        is_mine = ids[..., None] == mine  # (B, T, n)
        # A product with zeros and ones: its gradient sums in a fixed order; that of indexing does not.
        rows = is_mine.to(vectors.dtype) @ vectors  # (B, T, D)
        return torch.where(is_mine.any(-1, keepdim=True), rows.to(embeds.dtype), embeds)

    def norm(self) -> Tensor:
        """The length of each vector, (n,)."""
        return self.vectors.detach().norm(dim=-1)

    def nearest(self, table: Tensor, k: int = 5, among: list[int] | None = None) -> list[list[tuple]]:
        """Find the k rows of a vocabulary table (V, D) closest in direction to each vector, as (id, cosine).

        The closest comes first; `among` limits the search to some ids.
        """
        among = torch.tensor(range(len(table)) if among is None else among, device="cpu")
        rows = F.normalize(table.detach()[among.to(table.device)].float(), dim=-1)
        vectors = F.normalize(self.vectors.detach().to(rows.device), dim=-1)
        cosines, found = (vectors @ rows.T).topk(min(k, len(rows)))  # (n, k)
        ids = among[found.cpu()]
        return [list(zip(row, values)) for row, values in zip(ids.tolist(), cosines.tolist())]
