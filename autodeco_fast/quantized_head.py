"""An 8-bit copy of an output embedding that knows how far it can be off: it rules out nearly every
token of a row, and only the rest need the exact weight.

    w = a·q + e,    q of 8 bits,    a = max |w| / 127        for each row w of the weight

For a row h of hidden states, in exact arithmetic,

    h·w = a·(h·q) + h·e,      |h·e| ≤ ‖h‖·‖e‖                (Cauchy–Schwarz)

Sums round. One of H products s_j·t_j in fp32, in any order, fused or not, is off by at most
γ·‖s‖·‖t‖ with γ = H·u / (1 − H·u), u = 2⁻²⁴ (Higham, *Accuracy and Stability of Numerical
Algorithms*, §3.1, and Cauchy–Schwarz for Σ |s_j·t_j|). A matrix unit takes k ≥ 4 exact products and
the sum so far at once, shifts all to the exponent of the largest, drops what is below its 23rd
fraction bit, adds, and truncates (Fasi et al., *Numerical behavior of NVIDIA tensor cores*, PeerJ
CS 2021; an A100 keeps one bit more, an H100 two: arXiv 2512.07004). That is off by at most k + 2
times 2⁻²³·Σ |s_j·t_j|, 1.5·2⁻²³ a product. γ' with u' = 2⁻²² covers both, so that the logit z,
wherever it is made, is off from h·w by at most γ'·‖h‖·‖w‖, and with

    r = ‖e‖ + γ'·‖w‖ + 32u·a·‖q‖,    |z − a·(h·q)| ≤ ‖h‖·r

of which the last term pays for roundings of what is compared. Norms are fp64 sums rounded up;
`_UNDERFLOW` is more than what underflows. To this comes what ẑ is off from a·(h·q):

- here, ẑ = fl(a·fl(h·q)) in fp32: γ·a·‖h‖·‖q‖.
- in `kernels/quantized_head.py` h is split in two parts of 8 bits and a rest f, products are exact
  in int32, and ẑ is off by ‖f‖·a·‖q‖. With h = k·p + k/256·s + f, |k·p_j| ≤ 2·|h_j| and
  |k/256·s_j| ≤ 2·|h_j|, so that the four roundings of ẑ, and that of ẑ ± reach, stay below
  (4·4 + 5)·u·a·‖h‖·‖q‖.

A token is in the kept set if z ≥ max z + c. Then ẑ + ‖h‖·r ≥ max (ẑ − ‖h‖·r) + c, and the
rounding of logits to the weight's dtype keeps that order. So whatever fails the test is ruled out,
by a proof and not by a calibration.
"""

import torch

from autodeco_fast.numerics import GREEDY_BELOW

_CODES = 127
_UNIT = 2.0**-24
_MATRIX_UNIT = 2.0**-22
_UNDERFLOW = 1e-30  # of H products below 2⁻¹²⁶ and of their sum
_UP = 1 + 1e-6  # more than the roundings of a norm in fp64 and of its cast to fp32
_ROWS = 4096  # of the weight, quantised at once


def _gamma(H: int, u: float) -> float:
    """Of a sum of H products whose steps are off by u."""
    return H * u / (1 - H * u)


class QuantizedLMHead:
    """An output embedding with an 8-bit copy, which `linear_sample` takes in place of the weight.

    It draws the token of the plain call: Triton's kernels from the same logits bit for bit, the
    torch backend from those of a smaller product, equal up to its rounding (`kept_logits`).

    Args:
        weight: `[V, H]` fp32 or bf16; kept, not copied if its rows are contiguous. It must not
            change afterwards.

    Attributes:
        weight: as given.
        codes: `[V, H]` int8.
        scale: `[V]` fp32, a.
        radius: `[V]` fp32, r: `|z − a·(h·q)| ≤ ‖h‖·r`. Infinite where the weight is not finite.
        length: `[V]` fp32, a·‖q‖.

    Raises:
        ValueError: for another dtype or number of dimensions.
    """

    def __init__(self, weight: torch.Tensor):
        if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                "weight must be [V, H] float32 or bfloat16, "
                f"got shape {tuple(weight.shape)} {weight.dtype}"
            )
        self.weight = weight.detach() if weight.stride(1) == 1 else weight.detach().contiguous()
        self.codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.scale, self.radius, self.length = torch.empty(3, len(weight), device=weight.device)
        for start in range(0, len(weight), _ROWS):
            self._quantize(slice(start, start + _ROWS))

    def _quantize(self, rows: slice) -> None:
        w = self.weight[rows].double()
        H, a = w.shape[1], w.abs().amax(1) / _CODES
        # No codes for rows that are zero, so small that 1/a is infinite, or not finite.
        usable = (a > 1e-36) & (a < 1e30)
        a = torch.where(usable, a, 0.0).float().double()  # as `scale` holds it
        q = (w / torch.where(usable, a, 1.0)[:, None]).round().clamp(-_CODES, _CODES)
        q = torch.where(usable[:, None], q, 0.0)
        e, norm, size = (x.norm(dim=1) for x in (w - a[:, None] * q, w, a[:, None] * q))
        r = e + _gamma(H, _MATRIX_UNIT) * norm + 32 * _UNIT * size
        self.codes[rows], self.scale[rows] = q.to(torch.int8), a.float()
        self.radius[rows] = (r * _UP + _UNDERFLOW).nan_to_num(nan=torch.inf).float()
        self.length[rows] = (size * _UP).nan_to_num(nan=torch.inf).float()

    def bounds(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest that each logit can be, before it is rounded to a dtype.

        Args:
            hidden: `[B, H]` of the weight's dtype.

        Returns:
            `[B, V]` fp32 both; −inf and inf, or NaN, where nothing is known.
        """
        h = hidden.float()
        size = (h.double().norm(dim=1, keepdim=True) * _UP).float()
        middle = torch.empty(len(h), len(self.codes), device=h.device)
        for start in range(0, len(self.codes), _ROWS):
            rows = slice(start, start + _ROWS)
            torch.mm(h, self.codes[rows].float().T, out=middle[:, rows])
        middle *= self.scale
        reach = size * (self.radius + _gamma(h.shape[1], _UNIT) * self.length) + _UNDERFLOW
        return middle - reach, middle + reach

    def possible(
        self, hidden: torch.Tensor, temperature: float | torch.Tensor, min_p: float | torch.Tensor
    ) -> torch.Tensor:
        """Which tokens Min-P may keep, `[B, V]` bool: those that the bounds do not rule out.

        Args:
            hidden: `[B, H]` of the weight's dtype.
            temperature, min_p: numbers or `[B]`, as in `sample`.
        """
        low, high = (x.to(hidden.dtype).float() for x in self.bounds(hidden))
        T, p = (
            torch.as_tensor(x, device=low.device).double().reshape(-1, 1)
            for x in (temperature, min_p)
        )
        # Below what a sampler makes of it in fp32, from where on all sums here round as its do.
        cut = (torch.where(T < GREEDY_BELOW, 0.0, T * p.log()) * _UP).float()
        return ~(high < low.amax(1, keepdim=True) + cut)  # NaN rules nothing out

    def kept_logits(
        self, hidden: torch.Tensor, temperature: float | torch.Tensor, min_p: float | torch.Tensor
    ) -> torch.Tensor:
        """`hidden @ weight.T`, `[B, V]`, in the columns of tokens that Min-P may keep in some row;
        −inf in the others.

        Up to the rounding of the product: a BLAS may sum a column in another order where it stands
        elsewhere (of few rows, some do), and then a near tie may go the other way.
        Arguments as in `possible`. All columns where products may be rounded further
        (`torch.set_float32_matmul_precision`, autocast).
        """
        exact = torch.get_float32_matmul_precision() == "highest"
        if not exact or torch.is_autocast_enabled(hidden.device.type):
            return hidden @ self.weight.T
        ids = self.possible(hidden, temperature, min_p).any(0).nonzero()[:, 0]
        if 2 * len(ids) > len(self.weight):
            return hidden @ self.weight.T
        z = hidden.new_full((len(hidden), len(self.weight)), -torch.inf)
        z[:, ids] = hidden @ self.weight[ids].T
        return z
