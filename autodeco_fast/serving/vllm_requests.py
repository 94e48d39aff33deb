"""vLLM's logits processors: single requests' options, the cut, the log.

vLLM has two runners with an interface each, and loads the same entry points for both; these classes
have both interfaces.

V1: `update_state` says which request is in which place of the batch; a place is a row. Penalties
    come after processors that may change a greedy token, and before those that may not: `Requests`
    is of the first kind, the cut is left to `Cut`.
V2: `add_request` fills a slot; rows come in any order with their slots, several a request under
    speculation, and in slices. Penalties come first, and `Requests` does everything.
"""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import (
    LOGITSPROCS_GROUP,
    BatchUpdate,
    process_dict_updates,
)
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from autodeco_fast.policies.base import Picked
from autodeco_fast.serving import vllm_loading
from autodeco_fast.serving.vllm_log import TemperatureLog
from autodeco_fast.serving.vllm_model import Adaptive
from autodeco_fast.serving.vllm_rows import RequestOptions, Row, Rows, read_options
from autodeco_fast.serving.vllm_settings import Settings, head_of, read_settings, switched_off

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

_Placed = tuple[Row, list[int] | None]  # a request, and V1's list of its new tokens


class Requests(V1Processor, V2Processor):
    """What requests ask of the head of this engine; without a head it does nothing.

    Raises:
        RuntimeError: if a head is configured and this process has no wrapped loaders, which is so
            where VLLM_PLUGINS names other plugins only, or if nobody would cut.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        device_or_state: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,
    ):
        self._config = vllm_config
        self._head = None if switched_off() else head_of(vllm_config)
        if self._head is not None and not vllm_loading.is_installed():
            raise RuntimeError(
                f"head {self._head!r} is configured and the plugin autodeco_fast was not loaded: "
                "VLLM_PLUGINS must name it too, or be unset"
            )
        self._is_v2 = is_pin_memory is None
        if self._head is not None and not self._is_v2:
            _require_cut()
        device = device_or_state.device if self._is_v2 else device_or_state
        self._state = device_or_state if self._is_v2 else None
        self._speculates = vllm_config.speculative_config is not None
        self._slots = vllm_config.scheduler_config.max_num_seqs
        self._device = torch.device(device)
        self._placed: dict[int, _Placed] = {}
        self._made: tuple[Adaptive, Rows] | None = None
        self._picked: Picked | None = None  # V1: of the rows that `Cut` gets next
        settings = read_settings(vllm_config) if self._head is not None else Settings()
        self._sampler_cuts = settings.sampler == "fused"
        writes = settings.log is not None and get_tensor_model_parallel_rank() == 0
        self._log = TemperatureLog(settings.log) if writes else None

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raises ValueError for options that are none, which HTTP clients see as status 400."""
        read_options(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    # V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None or not self._works(batch_update.added):
            return
        before, (_, rows) = dict(self._placed), self._working()
        process_dict_updates(self._placed, batch_update, self._place)
        for slot in before.keys() | self._placed.keys():
            placed = self._placed.get(slot)
            if placed is not before.get(slot):
                rows.put(slot, None if placed is None else placed[0])

    def _place(
        self, params: "SamplingParams", prompt: list[int] | None, new_tokens: list[int]
    ) -> _Placed:
        return self._row(params), new_tokens

    # V2

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        if not self._works([(req_idx, sampling_params)]):
            return False
        _, rows = self._working()
        rows.put(req_idx, self._row(sampling_params))
        # Under speculation rows come in slices, and none may be left out: they are counted.
        return self._speculates or rows.needs(req_idx, min_p=not self._sampler_cuts)

    def own_min_p(self, rows: torch.Tensor) -> torch.Tensor:
        """The head's Min-P by slots of rows, `[R]`; 0 where the request has another or none."""
        _, requests = self._working()
        requests.upload()
        return requests.min_p(rows)

    def apply_staged_writes(self) -> None:
        if self._made is not None:
            self._made[1].upload()

    # both

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        if self._head is None:
            return logits
        adaptive, rows = self._working()
        rows.upload()
        picked = adaptive.take(len(logits))
        if ctx is None:
            self._picked = picked
            slots, row_slots = _places(logits)
            logits, T = rows.scale(logits, picked, slots, row_slots)
        else:
            slots, row_slots = ctx.idx_mapping_np, ctx.expanded_idx_mapping
            logits, T = rows.apply(logits, picked, slots, row_slots)
        if self._log is not None and any(slot in rows.log_keys for slot in slots.tolist()):
            self._write(rows, T, row_slots, ctx)
        return logits

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        """V1's cut of the rows that `apply` had last, over the requests' temperatures by now."""
        _, rows = self._working()
        return rows.cut(logits, self._picked, *_places(logits), over_temperature=True)

    def _row(self, params: "SamplingParams") -> Row:
        adaptive, _ = self._working()
        _warn(params, adaptive)
        return Row.of(params, adaptive.policy, cuts_here=not adaptive.cuts_here)

    def _works(self, added: Any) -> bool:
        """Whether there is a head; requests that ask something of one are told where there is
        none."""
        if self._head is not None:
            return True
        if any(read_options(each[1]) != RequestOptions() for each in added):
            logger.warning_once("Requests ask for adaptive decoding; this server has no head")
        return False

    def _working(self) -> tuple[Adaptive, Rows]:
        """What is attached to the model, and the requests beside it."""
        if self._made is None:
            adaptive = vllm_loading.attached(self._config)
            if adaptive is None:
                raise RuntimeError(
                    f"head {self._head!r} is configured and not attached to the model: its "
                    "load_format was registered after the plugin autodeco_fast was loaded"
                )
            top_p = adaptive.predicts_top_p and not adaptive.cuts_here
            self._made = adaptive, Rows(self._slots, self._device, top_p=top_p)
            adaptive.cut_later = self._cut
        return self._made

    def _write(
        self, rows: Rows, T: torch.Tensor, row_slots: torch.Tensor, ctx: LogitsContext | None
    ) -> None:
        temperatures, slots = T.tolist(), row_slots.tolist()
        if ctx is None:
            indices = [len(self._placed[slot][1]) if slot in self._placed else 0 for slot in slots]
        else:
            prompts = self._state.prompt_len.np
            indices = [at + 1 - int(prompts[slot]) for at, slot in zip(ctx.pos.tolist(), slots)]
        keys = (rows.log_keys.get(slot) for slot in slots)
        lines = list(zip(keys, indices, temperatures))
        # Below 0 are ends of steps within the prompt: no token is drawn there.
        self._log.write([line for line in lines if line[0] is not None and line[1] >= 0])


class Cut(V1Processor, V2Processor):
    """In V1, the cut of `Requests`, behind penalties and temperatures; in V2 nothing."""

    def __init__(self, vllm_config: "VllmConfig", *_: object):
        self._config = vllm_config

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """`Requests` has the rows."""

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        adaptive = vllm_loading.attached(self._config) if ctx is None else None
        if adaptive is None:  # the V2 runner, or there is no head
            return logits
        return adaptive.cut_later(logits)


def _places(logits: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """V1's slots and slots of rows: they are the rows."""
    return np.arange(len(logits)), torch.arange(len(logits), device=logits.device)


def _require_cut() -> None:
    """Raises RuntimeError if this package was installed when it had no `Cut`."""
    if not any(each.load() is Cut for each in entry_points(group=LOGITSPROCS_GROUP)):
        raise RuntimeError(
            "the entry points of autodeco_fast are those of another version: install it again"
        )


def _warn(params: "SamplingParams", adaptive: Adaptive) -> None:
    """One line where a request contradicts what the head was calibrated for."""
    options, own = read_options(params), adaptive.policy.trained_min_p
    if not options.autodeco or not params.temperature:
        return
    asked = params.min_p or options.autodeco_min_p
    if own is not None and asked is not None and asked > 0 and abs(asked - own) > 1e-6:
        logger.warning_once(
            "A request's min_p %g is not the %g that the head was made for: its coverage does not "
            "hold (told once)",
            asked,
            own,
        )
    if params.top_k > 0 or params.top_p < 1:
        logger.warning_once(
            "A request's top_k %s and top_p %g cut beside the head, whose coverage does not hold "
            "then; `--generation-config vllm` leaves out those that the model brings (told once)",
            params.top_k,
            params.top_p,
        )
