"""Whether the rates of TrainConfig reach weights that learn: what has no effect with a method is refused.

The groups and the rates themselves are optim.py's: an adapter's factors are matrices of their block (its layer_lr_decay, the
decay of the matrices), DoRA's lengths are vectors (no decay), an adapter on the head goes by head_lr.
"""

from __future__ import annotations

from torch import nn

from kobza.config import TrainConfig, require
from kobza.finetune.config import MethodConfig
from kobza.optim import parameter_groups


def check_rates(model: nn.Module, method: MethodConfig, train: TrainConfig) -> None:
    """Refuse settings of the training that reach nothing. `choose_weights` has been at the model."""
    groups = parameter_groups(model)
    how = f"with --method {method.method}"
    remedy = "leave it out" if method.method != "lora" else "add --embeddings or leave it out"
    for name, reached, default in (
        ("head_lr", groups["head"], 0.0),
        ("embed_lr", groups["tables"], 0.0),
        ("embed_weight_decay", groups["tables"] + groups["head"], -1.0),
    ):
        idle = f"train.{name} has no effect {how}: no such weight learns; {remedy}"
        require(bool(reached) or getattr(train, name) == default, idle)
    inside, decay = groups["matrices"] + groups["vectors"], train.layer_lr_decay
    require(
        bool(inside) or decay == 1, f"train.layer_lr_decay {decay} has no effect {how}: no block learns; leave it out"
    )
    muon = f"train.optimizer muon has no effect {how}: it moves the matrices of the blocks; take train.optimizer adamw"
    require(bool(groups["matrices"]) or train.optimizer != "muon", muon)
    full = method.method == "full"
    require(
        full or not train.freeze, f"train.freeze has no effect {how}: all but what it names is frozen; leave it out"
    )
    eight = f"--eight-bit keeps the state of AdamW and train.optimizer is {train.optimizer}; take train.optimizer adamw"
    require(not method.eight_bit or train.optimizer == "adamw", eight)
