from __future__ import annotations

import pytest
import tiny_hybrid as tiny
import torch

from hybrid.ties import RULE, TIE, compare, last_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_near_the_largest_logit_is_a_near_tie(dtype: torch.dtype) -> None:
    model, (prompt,) = tiny.model().to(dtype), tiny.prompts(7)
    plain = tiny.greedy(model, prompt, 3)
    logits = last_logits(model, torch.tensor([[*prompt, *plain[:1]]])).detach()
    assert logits.dtype == torch.float32
    kinds = set()
    for token in range(tiny.VOCAB):
        if token == plain[1]:
            continue
        worse = min(logits[token].item(), logits[plain[1]].item())
        gap = (logits.max().item() - worse) / logits.std().item()
        kind, found = compare(model, prompt, plain, [plain[0], token, 5])
        assert found == pytest.approx(gap, abs=1e-5)
        assert kind == ("near_tie" if gap <= TIE[dtype] else "wrong")
        kinds.add(kind)
    assert "wrong" in kinds
    assert compare(model, prompt, plain, plain) == ("exact", 0.0)
    for other in (plain[:2], [*plain, 3]):
        assert compare(model, prompt, plain, other)[0] == "wrong", "no tie explains where a reply ends"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_of_two_equal_tokens_comes_first_is_nobodys_fault(dtype: torch.dtype) -> None:
    model, (prompt,) = tiny.model().to(dtype), tiny.prompts(7)
    plain = tiny.greedy(model, prompt, 4)
    logits = last_logits(model, torch.tensor([[*prompt, *plain[:2]]]))
    worst = int(logits.argmin())
    assert compare(model, prompt, plain, [*plain[:2], worst, 0])[0] == "wrong"
    with torch.no_grad():
        model.model.embed_tokens.weight[worst] = model.model.embed_tokens.weight[plain[2]]
    kind, gap = compare(model, prompt, plain, [*plain[:2], worst, 0])
    assert kind == "near_tie" and gap <= TIE[dtype]


def test_the_rule_says_the_bounds() -> None:
    assert f"{TIE[torch.bfloat16]:g} standard" in RULE and f"{TIE[torch.float32]:.4f} where" in RULE
