"""Fine-tuning on the same pairs: LoRA by maximum likelihood (SFT) or by preference (DPO).

Rank, rate and epochs are chosen on validation as a vector's layers and strength are, and the merged
model is judged as any other.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from offline.model import Decoder, as_decoder
from offline.prompts import TokenPair

RANKS = (4, 16)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
EPOCHS = (1, 2, 4, 8, 16, 32)
BATCH = 10  # pairs
BETA = 0.1  # DPO's temperature, as its authors chose
Loss = Literal["sft", "dpo"]
LOSSES: tuple[Loss, ...] = ("sft", "dpo")


@dataclass(frozen=True)
class Tuning:
    """One way of fine-tuning."""

    loss: Loss
    rank: int
    rate: float
    epochs: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def tuned(
    decoder: Decoder,
    pairs: Sequence[TokenPair],
    loss: Loss,
    rank: int,
    rate: float,
    epochs: Sequence[int] = EPOCHS,
) -> Iterator[tuple[Tuning, Decoder]]:
    """Trains once, and yields the merged model after each of `epochs` (ascending)."""
    torch.manual_seed(0)
    model = get_peft_model(
        copy.deepcopy(decoder.model),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    with torch.no_grad():
        reference = margins(decoder.model, pairs)
    order = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs[-1] + 1):
        for batch in torch.randperm(len(pairs), generator=order).split(BATCH):
            members = [pairs[index] for index in batch.tolist()]
            if loss == "sft":
                value = likelihood_loss(model, members)
            else:
                value = preference_loss(margins(model, members), reference[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if epoch in epochs:
            yield Tuning(loss, rank, rate, epoch), merged(model, decoder)


def merged(model: Any, decoder: Decoder) -> Decoder:
    """The adapters added into a copy of the weights: an ordinary model of the same class."""
    plain = copy.deepcopy(model).merge_and_unload()
    return as_decoder(plain, decoder.tokenizer, decoder.name)


def likelihood_loss(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """Mean over pairs of the chosen answer's negative log-likelihood per token."""
    sums = answer_logps(model, [(pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs])
    return -(sums / lengths).mean()


def preference_loss(margin: Tensor, reference: Tensor) -> Tensor:
    """DPO (Rafailov et al., 2023) from margins of the model in training and of the original."""
    return -logsigmoid(BETA * (margin - reference)).mean()


def margins(model: Any, pairs: Sequence[TokenPair]) -> Tensor:
    """log p(chosen) - log p(rejected), summed over tokens: [pairs]."""
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    chosen, rejected = answer_logps(model, rows).chunk(2)
    return chosen - rejected


def answer_logps(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Summed log-likelihood of each row's answer after its prompt: [rows]."""
    ids = pad_sequence([torch.tensor(p + a) for p, a in rows], batch_first=True)
    # Padding is on the right, so causal attention never sees it: no mask is needed.
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    found = logps.gather(2, ids[:, 1:, None])[..., 0]
    at = torch.arange(ids.shape[1] - 1)
    starts = torch.tensor([len(p) - 1 for p, _ in rows])[:, None]
    ends = starts + torch.tensor([len(a) for _, a in rows])[:, None]
    return (found * ((at >= starts) & (at < ends))).sum(1)
