"""What the stages are compared with: Hugging Face's Llama with mixers in the places of attention, eager, x and B
repeated to all heads, a dense mask for packed rows, and logits whole and in float32."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, softplus

from hybrid import HybridForCausalLM
from hybrid.bench.peers import transformers_twin
from hybrid.mamba2 import GatedRMSNorm, Mamba2Mixer
from kernels_ext.causal_conv.reference import causal_conv
from kernels_ext.gated_norm.reference import gated_rms_norm
from kernels_ext.ssd.mamba_ssm_kernel import ssd_mamba_ssm
from kernels_ext.ssd.reference import ssd_chunked
from steps.config import DPOConfig, TrainConfig
from steps.dpo import PairBatch
from steps.loop import BatchSource, autocast, on_device
from steps.stage import StageContext
from steps.students import TokenBatch


class NaiveForm:
    """A teacher and a student with the weights of ours, and the loss of one stage on them.

    student: as `hybrid.init_map.from_attention` made it of the teacher, so that all but its mixers is the teacher's.
    """

    def __init__(self, stage: str, teacher: HybridForCausalLM, student: HybridForCausalLM, config: TrainConfig) -> None:
        self.layers, self.config = student.config.mamba_layers, config
        self.student = transformers_twin(teacher).float()
        for i in self.layers:
            mixer = student.blocks[i].mamba
            assert isinstance(mixer, Mamba2Mixer)
            self.student.model.layers[i].self_attn = RepeatedHeads(deepcopy(mixer).float())
        self.teacher = transformers_twin(teacher) if stage in ("align", "kl") else None
        mixers = [p for i in self.layers for p in self._mixer(i).parameters()]
        self.trained = mixers if stage == "align" else list(self.student.parameters())
        losses: dict[str, Callable[[Any], Tensor]] = {
            "align": self._align,
            "kl": self._kl,
            "sft": self._sft,
            "dpo": self._dpo,
        }
        self.loss = losses[stage]

    def fit(self, batches: BatchSource, steps: int, context: StageContext) -> float:
        """AdamW under autocast with clipped gradients, as `steps.loop.train` without what that adds; the first loss."""
        first = torch.full((), float("nan"))
        for parameter in self.trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.trained, lr=self.config.mixer_lr, betas=self.config.betas, fused=True)
        for number in range(steps):
            data = on_device(batches(number).data, context.device)
            with autocast(context):
                loss = self.loss(data)
            first = loss.detach() if number == 0 else first
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        return first.item()

    def hidden(self, tokens: Tensor, seq_idx: Tensor) -> Tensor:
        """The student's final hidden states (B, L, d_model)."""
        return self.student.model(**_packed(tokens, seq_idx)).last_hidden_state

    def _align(self, batch: TokenBatch) -> Tensor:
        taught: dict[int, tuple[Tensor, Tensor]] = {}
        assert self.teacher is not None

        def recorder(layer: int) -> Callable[..., None]:
            def record(_: nn.Module, args: tuple[()], kwargs: dict[str, Tensor], output: tuple[Tensor, Any]) -> None:
                taught[layer] = kwargs["hidden_states"], output[0]

            return record

        attention = [(i, self.teacher.model.layers[i].self_attn) for i in self.layers]
        handles = [module.register_forward_hook(recorder(i), with_kwargs=True) for i, module in attention]
        with torch.no_grad():
            self.teacher.model(**_packed(batch.tokens, batch.seq_idx))
        for handle in handles:
            handle.remove()
        errors = []
        for layer, (given, wanted) in taught.items():
            output, _ = self._mixer(layer)(given, batch.seq_idx)
            errors.append((output.float() - wanted.float()).pow(2).sum() / wanted.float().pow(2).sum())
        return torch.stack(errors).mean()

    def _kl(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            log_p = log_softmax(_logits(self.teacher, batch), dim=-1)
        log_q = log_softmax(_logits(self.student, batch), dim=-1)
        per_token = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        return (per_token * batch.mask).sum() / batch.mask.sum()

    def _sft(self, batch: TokenBatch) -> Tensor:
        logits = _logits(self.student, batch)
        per_token = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return (per_token * batch.mask.flatten()).sum() / batch.mask.sum()

    def _dpo(self, batch: PairBatch) -> Tensor:
        assert isinstance(self.config, DPOConfig)
        log_p = log_softmax(_logits(self.student, batch), dim=-1)
        replies = (log_p.gather(-1, batch.targets[..., None])[..., 0] * batch.mask).sum(-1)  # (2P,)
        chosen, rejected = (replies - batch.reference).chunk(2)
        return -logsigmoid(self.config.beta * (chosen - rejected)).mean()

    def _mixer(self, layer: int) -> nn.Module:
        return self.student.model.layers[layer].self_attn


class RepeatedHeads(nn.Module):
    """A Mamba-2 mixer in the place of a Llama's `self_attn`."""

    def __init__(self, mixer: Mamba2Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, seq_idx: Tensor, **_: Any) -> tuple[Tensor, None]:
        mixer, config = self.mixer, self.mixer.config
        z, xBC, dt = mixer.project(hidden_states)
        dt = softplus(dt.float() + mixer.dt_bias)
        xBC = causal_conv(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, seq_idx, silu=config.conv_silu)
        sizes, ratio = (config.d_xb, config.d_xb, config.d_inner), config.n_heads // config.groups
        x, B, C = (t.unflatten(-1, (-1, config.head_dim)) for t in xBC.split(sizes, dim=-1))
        x, B = (t.repeat_interleave(ratio, dim=2) for t in (x, B))  # (B, L, H, P)
        scan = ssd_mamba_ssm if x.is_cuda and _mamba_ssm_imports() else ssd_chunked
        y, _state = scan(x, dt, mixer.A, B, C, mixer.D, seq_idx)
        assert isinstance(mixer.norm, GatedRMSNorm)
        y = gated_rms_norm(y.flatten(-2), z, mixer.norm.weight, mixer.norm.group_size, mixer.norm.eps)
        return mixer.out_proj(y), None


def _mamba_ssm_imports() -> bool:
    try:
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except ImportError:
        return False
    return True


def _logits(model: Any, batch: TokenBatch | PairBatch) -> Tensor:
    """(B, L, V) float32."""
    return model(**_packed(batch.tokens, batch.seq_idx)).logits.float()


def _packed(tokens: Tensor, seq_idx: Tensor) -> dict[str, Any]:
    """Arguments of a Llama for packed rows: a mask (B, 1, L, L) and positions (B, L) that start anew in a document."""
    same = seq_idx[:, None, :, None] == seq_idx[:, None, None, :]
    causal = torch.ones_like(same[0, 0]).tril()
    before = (same & causal).sum(-1)[:, 0]  # tokens of the document up to this one
    return {
        "input_ids": tokens,
        "attention_mask": same & causal,
        "position_ids": before - 1,
        "use_cache": False,
        "seq_idx": seq_idx,
    }
