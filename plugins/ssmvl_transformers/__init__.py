"""Causal language models of transformers as a plugin: attention models behind ssmvl's contract."""

from ssmvl import hookimpl
from ssmvl.registry import Register


@hookimpl
def ssmvl_register(register: Register) -> None:
    """Register the language model and the layout of its weights."""
    register("language_model", "causal_lm", "ssmvl_transformers.causal_lm:CausalLM")
    register("checkpoint", "transformers", "ssmvl_transformers.causal_lm_layout:transformers_causal_lm")
