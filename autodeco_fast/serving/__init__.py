"""Heads behind stock servers, by the servers' own plugin points; nothing of theirs is replaced.

vllm.py           entry point `vllm.general_plugins`: runs in every process of vLLM
vllm_settings.py  what a server was told: `additional_config`, the environment, the model's folder
vllm_loading.py   vLLM's model loaders, wrapped: heads are attached, AutoDeco's checkpoints read
vllm_model.py     logits over the predicted T where they leave the model
vllm_requests.py  entry points `vllm.logits_processors`: what single requests ask for
vllm_rows.py      their options, and what these do to rows of logits
vllm_sampler.py   this library's `sample` in vLLM's V2 runner
vllm_log.py       predicted temperatures in a file

Only these modules import vLLM; importing this package does not.
"""
