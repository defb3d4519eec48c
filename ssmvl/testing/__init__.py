"""Checks that component authors call in their own tests, one per kind.

A check takes the registered class or function, which the library calls with the injected arguments; bind options with
`functools.partial`. It returns nothing and raises a `ContractError` if the component violates the contract of its kind.

    from ssmvl.testing import check_mixer

    def test_my_mixer():
        check_mixer(functools.partial(MyMixer, d_state=16), width=32)
"""

from ssmvl.testing.checkpoints import check_checkpoint
from ssmvl.testing.prompts import check_prompt
from ssmvl.testing.runs import check_dataset, check_recipe
from ssmvl.testing.scan_orders import check_scan_order
from ssmvl.testing.sequence import check_language_model, check_mixer
from ssmvl.testing.vision import check_connector, check_encoder, check_fusion

__all__ = [
    "check_scan_order",
    "check_mixer",
    "check_encoder",
    "check_fusion",
    "check_connector",
    "check_language_model",
    "check_prompt",
    "check_dataset",
    "check_checkpoint",
    "check_recipe",
]
