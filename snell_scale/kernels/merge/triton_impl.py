"""Launches the Triton kernels of the merge and its gradients; see triton_kernels.py and triton_threshold.py.

Trusts its caller: a delta in contiguous fp32, ranks and column ranges within bounds. triton is imported at the
first launch, so that the package needs it only where it is used.
"""

import functools
import importlib.util
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .delta import Delta, FactorGradients


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: the tile's size and the number of warps that share it."""

    block_m: int
    block_n: int
    num_warps: int

    def arguments(self) -> dict[str, Any]:
        # kernel_values needs its own fused multiply-adds and no others, see triton_kernels.py.
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps,
            "enable_fp_fusion": False,
        }  # fmt: skip


# What tuning chooses from, and the first where there is nothing to time. An output element does not depend on it.
# With 32 columns to a warp each thread has consecutive rows of one column, whose factors it loads four at a time.
CONFIGS = (Config(32, 128, 4), Config(16, 128, 4), Config(64, 128, 4), Config(16, 256, 8), Config(32, 256, 8))
# Sums depend on the tile's shape in their last bits: these are never tuned, so that runs can be repeated.
SUM_CONFIG = Config(32, 128, 4)
GRADIENT_CONFIG = Config(64, 16, 4)
WIDE_GRADIENT_CONFIG = Config(32, 16, 4)
ROWS_PER_CHUNK = 256

# Partial dA and dB: each at most half a byte per entry of G, an eighth of its fp32 size; small ones as they come.
SCRATCH_BYTES_PER_ENTRY = 0.5
MIN_SCRATCH_BYTES = 2**21
# Programs in flight that fill a large GPU several times over; it decides how far columns are split for dB.
TARGET_PROGRAMS = 512

MIN_CAPACITY = 4096
ENTRIES_PER_CANDIDATE = 16
SAMPLE_SIZE = 16384
SAMPLE_BLOCK = 1024
SELECT_BLOCK, SELECT_WARPS = 16384, 32
BINS_BLOCK, BINS_WARPS = 4096, 16
UPPER_BINS, LOWER_BINS = 65536, 32768


def is_available() -> bool:
    """Whether triton can be imported; the other functions need it."""
    return importlib.util.find_spec("triton") is not None


def column_logs(delta: Delta) -> Tensor | None:
    """mixk: log Σ_i exp(K[i, j]/γ) with the K of distance, (G, columns) fp32; None for every other kernel.

    Transient: one fp32 per column and ROWS_PER_CHUNK rows.
    """
    if delta.kernel != "mixk":
        return None
    operands = _Operands.of(delta, None)
    config = SUM_CONFIG
    chunks, blocks = _cdiv(delta.num_rows, ROWS_PER_CHUNK), _cdiv(delta.num_columns, config.block_n)
    partial = torch.empty(delta.num_groups, chunks, delta.num_columns, dtype=torch.float32, device=delta.A.device)
    shared = operands.arguments()
    for unused in ("logs_ptr", "alpha_ptr", "beta_ptr", "KERNEL"):
        del shared[unused]
    with torch.cuda.device_of(partial):
        _kernels()._column_logs_kernel[(delta.num_groups * chunks * blocks,)](
            partial_ptr=partial, num_row_chunks=chunks, num_column_blocks=blocks, CHUNK=ROWS_PER_CHUNK,
            **shared, **config.arguments(),
        )  # fmt: skip
    return torch.logsumexp(partial, dim=1)


def merge_columns(
    delta: Delta,
    taus: Tensor | None,
    logs: Tensor | None,
    weight: Tensor | None,
    columns: slice,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """W0[:, columns] + ΔW[:, columns], (G·rows, len(columns)), summed in fp32 and rounded once to `dtype`.

    weight: (G·rows, all columns), any float dtype and strides; None: ΔW alone. taus: (G,) fp32, None exactly for
    a dense delta. logs: what column_logs returned. out: where the result goes, any strides; it may be
    weight[:, columns] itself.
    """
    first, num_columns = _extent(columns, delta)
    if out is None:
        out = torch.empty(delta.num_groups * delta.num_rows, num_columns, dtype=dtype, device=delta.A.device)
    if out.numel() == 0:
        return out
    operands = _Operands.of(delta, logs)
    row_stride, column_stride = (0, 0) if weight is None else weight.stride()

    def launch(config: Config, out: Tensor) -> None:
        row_blocks, column_blocks = _cdiv(delta.num_rows, config.block_m), _cdiv(num_columns, config.block_n)
        _kernels()._merge_fwd_kernel[(delta.num_groups * row_blocks * column_blocks,)](
            out_ptr=out, out_row_stride=out.stride(0), out_column_stride=out.stride(1),
            weight_ptr=_or(weight, out), weight_row_stride=row_stride, weight_column_stride=column_stride,
            tau_ptr=_or(taus, out), first_column=first,
            num_out_columns=num_columns, num_row_blocks=row_blocks, num_column_blocks=column_blocks,
            WEIGHTING=_gate_name(delta), HAS_WEIGHT=weight is not None,
            **operands.arguments(), **config.arguments(),
        )  # fmt: skip

    with torch.cuda.device_of(out):
        # Timed into a buffer of its own: repeated in place of the weight, the delta would be added many times.
        key = ("merge", out.dtype, None if weight is None else weight.dtype)
        launch(_tuned(key, operands, lambda config: launch(config, torch.empty_like(out))), out)
    return out


def find_thresholds(delta: Delta, logs: Tensor | None, ranks: Tensor, memory: Tensor | None) -> Tensor:
    """The ranks[g]-th smallest (from 0) of |K| of each group, (G,) fp32: exact, NaN last, without a host sync.

    ranks: (G,) int64. memory: (G, 2) fp32 on the same device, NaN at first: the bracket in which τ is looked for
    first, replaced by the next call's. Without one a sample of |K| gives the bracket. One pass over the matrix
    if τ lies in the bracket, three if not (passes that are not needed are launched, and return at once).
    Transient: candidates, a quarter of a byte per entry, and 768 KiB of histograms per group.
    """
    operands = _Operands.of(delta, logs)
    with torch.cuda.device_of(ranks):
        return _Selection(operands, ranks, memory).run(delta.num_entries)


def add_gradients(
    delta: Delta,
    taus: Tensor | None,
    logs: Tensor | None,
    G: Tensor,
    columns: slice,
    gradients: FactorGradients,
) -> None:
    """Adds what G = ∂L/∂W[:, columns] gives to every gradient asked for; writes gradients.A[:, :, columns].

    G: (G·rows, len(columns)), any float dtype and strides; read once, by mixk twice. Every partial sum has its
    own place and they are added in a fixed order: two calls agree bit for bit. Transient: see
    SCRATCH_BYTES_PER_ENTRY; mixk besides 16 bytes per column and ROWS_PER_CHUNK rows.
    """
    first, num_columns = _extent(columns, delta)
    if gradients.is_empty or num_columns == 0:
        return
    operands = _Operands.of(delta, logs)
    task = _GradientTask(operands, taus, G, first, num_columns, gradients)
    with torch.cuda.device_of(G):
        sums = task.add_mixk_parameters() if delta.kernel == "mixk" else None
        task.add_factors(sums)


def gradient_scratch_bytes(delta: Delta) -> int:
    """Transient of `add_gradients` for the whole matrix, dA and dB asked for: their partial sums."""
    return _GradientPlan.of(delta, delta.num_columns).scratch_bytes


def _gradient_config(delta: Delta) -> Config:
    return GRADIENT_CONFIG if delta.num_components * delta.A.shape[3] <= 64 else WIDE_GRADIENT_CONFIG


@dataclass(frozen=True)
class _Operands:
    """What every kernel takes: transposed factors, (G, H, Q, columns) and (G, H, Q, rows), and the parameters.

    H = 1 and Q = r where the kernel does not tell components apart.
    """

    delta: Delta
    a: Tensor
    b: Tensor
    logs: Tensor
    params: Sequence[Tensor]

    @classmethod
    def of(cls, delta: Delta, logs: Tensor | None) -> "_Operands":
        a, b = (factor.transpose(-1, -2).contiguous() for factor in (delta.A, delta.B))
        # A kernel that reads no logs or parameters is given some pointer all the same.
        return cls(delta, a, b, a if logs is None else logs, delta.params or (a, a, a))

    @property
    def components(self) -> tuple[int, int]:
        """(H, Q) as the kernels see them."""
        H, Q = self.delta.num_components, self.delta.A.shape[3]
        return (H, Q) if self.delta.kernel in ("distance", "mixk") else (1, H * Q)

    def arguments(self) -> dict[str, Any]:
        H, Q = self.components
        alpha, gamma, beta = self.params
        return {
            "a_ptr": self.a, "b_ptr": self.b, "logs_ptr": self.logs,
            "alpha_ptr": alpha, "gamma_ptr": gamma, "beta_ptr": beta, "scale": float(self.delta.scale),
            "num_rows": self.delta.num_rows, "num_columns": self.delta.num_columns,
            "KERNEL": self.delta.kernel, "H": H, "Q": Q,
        }  # fmt: skip


@dataclass(frozen=True)
class _Selection:
    """One call of find_thresholds."""

    operands: _Operands
    ranks: Tensor
    memory: Tensor | None

    def run(self, num_entries: int) -> Tensor:
        device, num_groups = self.ranks.device, len(self.ranks)
        capacity = min(num_entries, max(MIN_CAPACITY, num_entries // ENTRIES_PER_CANDIDATE))
        bracket = self._bracket(num_entries)
        taus = torch.empty(num_groups, dtype=torch.float32, device=device)
        is_found = torch.empty(num_groups, dtype=torch.int32, device=device)
        counts = torch.zeros(num_groups, 2, dtype=torch.int64, device=device)
        candidates = torch.empty(num_groups, capacity, dtype=torch.int32, device=device)
        config = self._collect_config(candidates, capacity)
        self._collect(config, counts, candidates, capacity, bracket)
        kernels = _threshold_kernels()
        kernels._select_kernel[(num_groups,)](
            taus, is_found, counts, candidates, capacity, bracket, self.ranks, BLOCK=SELECT_BLOCK,
            num_warps=SELECT_WARPS,
        )  # fmt: skip
        upper = torch.empty(num_groups, 2, dtype=torch.int64, device=device)
        bins = torch.zeros(num_groups * (UPPER_BINS + LOWER_BINS), dtype=torch.int64, device=device)
        upper_bins, lower_bins = bins.split([num_groups * UPPER_BINS, num_groups * LOWER_BINS])
        self._count(config, upper_bins, upper, is_found, is_upper=True)
        kernels._find_upper_kernel[(num_groups,)](
            upper, is_found, upper_bins, self.ranks, BLOCK=BINS_BLOCK, num_warps=BINS_WARPS
        )
        self._count(config, lower_bins, upper, is_found, is_upper=False)
        kernels._finish_kernel[(num_groups,)](
            taus, taus if self.memory is None else self.memory, upper, counts, is_found, lower_bins, bracket,
            self.ranks, capacity, HAS_MEMORY=self.memory is not None, BLOCK=BINS_BLOCK, num_warps=BINS_WARPS,
        )  # fmt: skip
        return taus

    def _bracket(self, num_entries: int) -> Tensor:
        """(G, 2) fp32: everything if all fit, else the memory's, else 4 standard errors about a sample's τ."""
        if num_entries > MIN_CAPACITY and self.memory is not None:
            return self.memory
        everything = torch.zeros(len(self.ranks), 2, dtype=torch.float32, device=self.ranks.device)
        everything[:, 1] = torch.inf
        if num_entries <= MIN_CAPACITY:
            return everything
        sample = torch.empty(len(self.ranks), SAMPLE_SIZE, dtype=torch.float32, device=self.ranks.device)
        blocks = SAMPLE_SIZE // SAMPLE_BLOCK
        _threshold_kernels()._sample_kernel[(len(self.ranks) * blocks,)](
            sample, SAMPLE_SIZE, num_blocks=blocks, BLOCK=SAMPLE_BLOCK, enable_fp_fusion=False,
            **self.operands.arguments(),
        )  # fmt: skip
        padded = torch.cat([everything[:, :1], sample.sort(dim=1).values, everything[:, 1:]], dim=1)
        place = self.ranks.double() * (SAMPLE_SIZE / num_entries)
        margin = 4 * (place * (1 - place / SAMPLE_SIZE)).sqrt() + 2
        places = torch.stack([(place - margin).floor(), (place + margin).ceil()], dim=1)
        return padded.gather(1, (places.long() + 1).clamp_(0, SAMPLE_SIZE + 1))

    def _collect_config(self, candidates: Tensor, capacity: int) -> Config:
        def launch(config: Config) -> None:
            # With a bracket of zeros and counts of its own: timing must not depend on what the bracket holds.
            counts = torch.zeros(len(self.ranks), 2, dtype=torch.int64, device=self.ranks.device)
            self._collect(config, counts, candidates, capacity, counts.to(torch.float32))

        return _tuned(("collect",), self.operands, launch)

    def _collect(
        self, config: Config, counts: Tensor, candidates: Tensor, capacity: int, bracket: Tensor
    ) -> None:  # fmt: skip
        grid, blocks = self._grid(config)
        _threshold_kernels()._collect_kernel[grid](
            counts, candidates, capacity, bracket, **blocks, **self.operands.arguments(), **config.arguments()
        )

    def _count(
        self, config: Config, bins: Tensor, upper: Tensor, is_found: Tensor, *, is_upper: bool
    ) -> None:  # fmt: skip
        grid, blocks = self._grid(config)
        _threshold_kernels()._histogram_kernel[grid](
            bins, upper, is_found, IS_UPPER=is_upper, **blocks, **self.operands.arguments(), **config.arguments()
        )

    def _grid(self, config: Config) -> tuple[tuple[int], dict[str, int]]:
        delta = self.operands.delta
        rows, columns = _cdiv(delta.num_rows, config.block_m), _cdiv(delta.num_columns, config.block_n)
        return (delta.num_groups * rows * columns,), {"num_row_blocks": rows, "num_column_blocks": columns}


@dataclass(frozen=True)
class _GradientTask:
    """One call of add_gradients: G is ∂L/∂W in columns [first_column, first_column + num_columns)."""

    operands: _Operands
    taus: Tensor | None
    G: Tensor
    first_column: int
    num_columns: int
    gradients: FactorGradients

    def add_mixk_parameters(self) -> Tensor:
        """Adds dα, dβ, dγ; returns colsum(Ĝ⊙s), (G, columns), which dK needs."""
        delta, config = self.operands.delta, SUM_CONFIG
        chunks, blocks = _cdiv(delta.num_rows, ROWS_PER_CHUNK), _cdiv(self.num_columns, config.block_n)
        shape = (4, delta.num_groups, chunks, self.num_columns)
        partial = torch.empty(shape, dtype=torch.float32, device=self.G.device)
        shared = self._arguments()
        del shared["KERNEL"]
        _kernels()._column_sums_kernel[(delta.num_groups * chunks * blocks,)](
            partial_ptr=partial, partial_stride=partial.stride(0), num_row_chunks=chunks,
            num_column_blocks=blocks, CHUNK=ROWS_PER_CHUNK, **shared, **config.arguments(),
        )  # fmt: skip
        sums, share_sums, base_sums, product_sums = partial.sum(dim=2)
        alpha, gamma, _ = delta.params
        dalpha, dgamma, dbeta = self.gradients.params
        if dalpha is not None:
            dalpha += share_sums.sum(dim=1)
        if dgamma is not None:
            dgamma -= alpha / gamma.square() * (product_sums - share_sums * base_sums).sum(dim=1)
        if dbeta is not None:
            dbeta += sums.sum(dim=1)
        return share_sums

    def add_factors(self, sums: Tensor | None) -> None:
        """Adds dA, dB and, but for mixk, the parameters' gradients, a chunk of row blocks at a time."""
        wants_params = sums is None and any(each is not None for each in self.gradients.params)
        if self.gradients.A is None and self.gradients.B is None and not wants_params:
            return
        config = _gradient_config(self.operands.delta)
        plan = _GradientPlan.of(self.operands.delta, self.num_columns)
        for first_block in range(0, plan.num_row_blocks, plan.blocks_per_launch):
            num_blocks = min(plan.blocks_per_launch, plan.num_row_blocks - first_block)
            partial = self._launch(config, plan, first_block, num_blocks, wants_params=wants_params, sums=sums)
            self._add(partial, first_row=first_block * config.block_m)
            del partial  # or it would stand beside the next launch's

    def _launch(
        self, config: Config, plan: "_GradientPlan", first_block: int, num_blocks: int, *, wants_params: bool,
        sums: Tensor | None,
    ) -> "_PartialGradients":  # fmt: skip
        H, Q = self.operands.components
        num_groups = self.operands.delta.num_groups
        wants_A, wants_B = self.gradients.A is not None, self.gradients.B is not None
        new = functools.partial(torch.empty, dtype=torch.float32, device=self.G.device)
        partial = _PartialGradients(
            A=new(num_groups, num_blocks, H, Q, self.num_columns) if wants_A else None,
            B=new(num_groups, plan.num_stripes, H, Q, num_blocks * config.block_m) if wants_B else None,
            params=new(num_groups, num_blocks * plan.num_stripes, 3) if wants_params else None,
        )
        _kernels()._factors_bwd_kernel[(num_groups * num_blocks * plan.num_stripes,)](
            da_ptr=_or(partial.A, self.G), db_ptr=_or(partial.B, self.G), dparams_ptr=_or(partial.params, self.G),
            sums_ptr=_or(sums, self.G), first_row_block=first_block, num_row_blocks=num_blocks,
            num_stripes=plan.num_stripes, tiles_per_stripe=plan.tiles_per_stripe,
            WANT_A=wants_A, WANT_B=wants_B, WANT_PARAMS=wants_params,
            Q_PADDED=max(16, 1 << (Q - 1).bit_length()), **self._arguments(), **config.arguments(),
        )  # fmt: skip
        return partial

    def _arguments(self) -> dict[str, Any]:
        row_stride, column_stride = self.G.stride()
        return self.operands.arguments() | {
            "grad_ptr": self.G, "grad_row_stride": row_stride, "grad_column_stride": column_stride,
            "tau_ptr": _or(self.taus, self.G), "first_column": self.first_column,
            "num_grad_columns": self.num_columns, "WEIGHTING": _gate_name(self.operands.delta),
        }  # fmt: skip

    def _add(self, partial: "_PartialGradients", first_row: int) -> None:
        delta = self.operands.delta
        by_component = (delta.num_groups, delta.num_components, delta.A.shape[3], -1)
        if partial.A is not None and self.gradients.A is not None:
            dA = self.gradients.A[:, :, self.first_column : self.first_column + self.num_columns]
            sums = partial.A.sum(dim=1).view(by_component).transpose(-1, -2)
            dA.copy_(sums) if first_row == 0 else dA.add_(sums)
        if partial.B is not None and self.gradients.B is not None:
            sums = partial.B.sum(dim=1).view(by_component).transpose(-1, -2)
            dB = self.gradients.B[:, :, first_row : first_row + sums.shape[2]]
            dB += sums[:, :, : dB.shape[2]]
        if partial.params is not None:
            alpha = delta.params[0]
            dalpha, dgamma, dbeta = partial.params.sum(dim=1).unbind(1)
            for gradient, sums in zip(self.gradients.params, (dalpha, dgamma, alpha * dbeta), strict=True):
                if gradient is not None:
                    gradient += sums


@dataclass(frozen=True)
class _GradientPlan:
    """One program per row block and stripe of columns, blocks_per_launch row blocks at a time."""

    num_row_blocks: int
    blocks_per_launch: int
    num_stripes: int
    tiles_per_stripe: int
    scratch_bytes: int

    @classmethod
    def of(cls, delta: Delta, num_columns: int) -> "_GradientPlan":
        config = _gradient_config(delta)
        num_row_blocks, column_blocks = _cdiv(delta.num_rows, config.block_m), _cdiv(num_columns, config.block_n)
        num_entries = delta.num_groups * delta.num_rows * num_columns
        bound = max(MIN_SCRATCH_BYTES, int(SCRATCH_BYTES_PER_ENTRY * num_entries))
        bytes_per_line = 4 * delta.num_groups * delta.num_components * delta.A.shape[3]
        blocks_per_launch = min(num_row_blocks, max(1, bound // (bytes_per_line * num_columns)))
        stripes_that_fit = max(1, bound // (bytes_per_line * blocks_per_launch * config.block_m))
        stripes_that_fill = _cdiv(TARGET_PROGRAMS, blocks_per_launch * delta.num_groups)
        tiles_per_stripe = _cdiv(column_blocks, min(stripes_that_fit, stripes_that_fill))
        num_stripes = _cdiv(column_blocks, tiles_per_stripe)
        scratch_bytes = bytes_per_line * blocks_per_launch * (num_columns + num_stripes * config.block_m)
        return cls(num_row_blocks, blocks_per_launch, num_stripes, tiles_per_stripe, scratch_bytes)


@dataclass(frozen=True)
class _PartialGradients:
    """A (G, blocks, H, Q, columns), B (G, stripes, H, Q, rows), params (G, programs, 3); summed over dim 1."""

    A: Tensor | None
    B: Tensor | None
    params: Tensor | None


_tuned_configs: dict[Hashable, Config] = {}


def _tuned(name: tuple[Hashable, ...], operands: _Operands, launch: Callable[[Config], None]) -> Config:
    """The fastest of CONFIGS, timed once per process, kernel, rank, size class and device.

    The first of them where nothing can be timed: without a GPU, in the capture of a CUDA graph, while tracing.
    `launch` must bear repetition.
    """
    device = operands.a.device
    if not _can_time(device):
        return CONFIGS[0]
    delta = operands.delta
    size_class = (delta.num_groups * delta.num_entries).bit_length()
    key = (*name, delta.kernel, *operands.components, size_class, device.index)
    if key not in _tuned_configs:
        _tuned_configs[key] = min(CONFIGS, key=lambda config: _milliseconds(functools.partial(launch, config)))
    return _tuned_configs[key]


def _can_time(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _milliseconds(launch: Callable[[], None], repetitions: int = 5) -> float:
    """The fastest of some launches on the current GPU, after one that compiles."""
    launch()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _extent(columns: slice, delta: Delta) -> tuple[int, int]:
    """(first column, number of columns)."""
    first, last, _ = columns.indices(delta.num_columns)
    return first, max(0, last - first)


def _gate_name(delta: Delta) -> str:
    return "dense" if delta.is_dense else delta.weighting


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """A kernel that reads or writes no such tensor is given some pointer all the same."""
    return unused if tensor is None else tensor


def _cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@functools.cache
def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _threshold_kernels() -> ModuleType:
    from . import triton_threshold

    return triton_threshold
