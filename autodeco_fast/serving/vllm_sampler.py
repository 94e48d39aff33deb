"""This library's `sample` in vLLM's V2 runner, by its hook `ModelState.custom_sampler`.

    token = argmax_i z'_i / t + g(seed, position, i)   over the kept set of Min-P

z' are logits over the predicted T, t and Min-P the request's (the head's Min-P where it names
none). One call in place of vLLM's copy, its passes for the head's cut, for t and for Min-P, and its
draw. What it does not know (penalties, biases, top-k, top-p, factors on T, the log) sends the whole
batch through vLLM's own sampler.
"""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from autodeco_fast.ops.sample import sample
from autodeco_fast.serving.vllm_requests import Requests

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


def model_state(model: nn.Module, config: "VllmConfig") -> type[ModelState]:
    """What vLLM would take as the model's state, with our sampler.

    Raises:
        ValueError: if the server is set up so that the sampler cannot be used.
    """
    complaint = "additional_config: autodeco_sampler must be vllm"
    if not config.use_v2_model_runner:
        raise ValueError(f"{complaint} with vLLM's V1 runner, which has no hook for a sampler")
    if config.speculative_config is not None:
        raise ValueError(f"{complaint} with speculative decoding, which draws in its own way")
    plain = resolve_model_state_cls(config, model)

    class WithSampler(plain):
        def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
            if type(sampler) is not Sampler or super().custom_sampler(sampler) is not None:
                raise ValueError(f"{complaint} with a sampler of the model's, or watermarks")
            sampler.__class__ = FusedSampler
            sampler.begin()
            return sampler, None

    return WithSampler


class FusedSampler(Sampler):
    """vLLM's sampler, which draws with `sample` where that knows all that a batch asks for."""

    def begin(self) -> None:
        """After the class was changed: vLLM has made the sampler already."""
        (self._requests,) = (each for each in self.logits_processors if type(each) is Requests)
        self._asks_more = np.zeros(len(self.needs_logits_processing), bool)
        self.fused_draws = 0  # calls that went through `sample`

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> None:
        # What still needs processing without the settings that `sample` knows is none of its.
        neutral = copy.copy(sampling_params)
        neutral.temperature, neutral.min_p = 1.0, 0.0
        super().add_request(req_idx, neutral)
        self._asks_more[req_idx] = self.needs_logits_processing[req_idx]
        needs = self.sampling_states.add_request(req_idx, sampling_params)
        needs |= self._requests.add_request(req_idx, sampling_params)
        self.needs_logits_processing[req_idx] |= needs

    def sample(
        self,
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        pos: torch.Tensor,
        *rest: Any,
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        processed = return_logprobs and self.logprobs_mode in PROCESSED_LOGPROBS_MODES
        if processed or self.use_fp64_gumbel or self._asks_more[idx_mapping_np].any():
            return self._by_vllm(
                logits,
                expanded_idx_mapping,
                idx_mapping,
                idx_mapping_np,
                pos,
                *rest,
                return_logprobs=return_logprobs,
            )
        states = self.sampling_states
        min_p = states.min_p.gpu[expanded_idx_mapping]
        drawn = sample(
            logits,
            states.temperature.gpu[expanded_idx_mapping],
            min_p=torch.maximum(min_p, self._requests.own_min_p(expanded_idx_mapping)),
            seed=states.seeds.gpu[expanded_idx_mapping],
            position=pos,
        )
        self.fused_draws += 1
        return drawn.token, logits

    def _by_vllm(self, logits: torch.Tensor, *batch: Any, return_logprobs: bool):
        """vLLM's own sampling, the head's cut included: its processor runs whatever was asked."""
        slots = batch[2]
        before = self.needs_logits_processing[slots].copy()
        self.needs_logits_processing[slots] = True
        try:
            return super().sample(logits, *batch, return_logprobs=return_logprobs)
        finally:
            self.needs_logits_processing[slots] = before
