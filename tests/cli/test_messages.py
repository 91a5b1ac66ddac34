# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make, through the command line, and what they are told: what was expected, where, what was there
instead, what to do. Never a traceback."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tiny
from fastpost.cli import main


@dataclass
class Desk:
    """A working folder with a model, data and a recipe, which a mistake then spoils."""

    path: Path

    def rows(self, rows, name="train.jsonl"):
        tiny.write_jsonl(self.path / name, rows)

    def text(self, text, name="train.jsonl"):
        (self.path / name).write_text(text)

    def recipe(self, text):
        (self.path / "r.yaml").write_text(text)

    def config(self, **changes):
        file = self.path / "model/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def template(self, template):
        file = self.path / "model/chat_template.jinja"
        if template is None:
            file.unlink()
        else:
            file.write_text(template)


PAIR = tiny.preference_rows(1)[0]
PLAIN = tiny.preference_rows(1, chat=False)[0]
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
RECIPE = (
    "model: {path: model}\ndata: {train: train.jsonl}\nobjective: {name: simpo}\ntrain: {output_dir: run, threads: 1}\n"
)
TRAIN = ("train", "r.yaml")


@dataclass
class Mistake:
    name: str
    where: str  # file, line, field or command
    what: str  # what was expected
    got: str  # what is there
    do: str  # the remedy
    spoil: object = None
    argv: tuple = TRAIN


def without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


def run_once(desk):
    assert main(["train", "r.yaml", "--train.max_steps", "1"]) == 0


def other(*options):
    return (*TRAIN, *options)


MISTAKES = [
    # ---- the command line ----
    Mistake("no such verb", "'trian'", "there is no verb", "trian", "Did you mean 'train'?", argv=("trian",)),
    Mistake("quantise with a misspelt method", "--method", "expected one of rtn", "'gtpq'", "Did you mean gptq",
            argv=("quantize", "model", "--out", "out", "--method", "gtpq")),
    Mistake("bits that a method does not do", "--bits", "nf4 does 4 bits", "got 3", "3 bits: rtn, gptq",
            argv=("quantize", "model", "--out", "out", "--method", "nf4", "--bits", "3")),
    Mistake("groups that do not divide", "model.layers.0.self_attn.q_proj", "128 does not divide", "the 32 columns",
            "Take 32", argv=("quantize", "model", "--out", "out", "--method", "rtn", "--perplexity", "t.txt"),
            spoil=lambda d: d.text("What is the sum?", "t.txt")),
    Mistake("calibration text that is too short", "short.txt", "at least one window of 512 tokens", "got 2 tokens",
            "--length", argv=("quantize", "model", "--out", "out", "--method", "gptq", "--group-size", "32",
            "--calibration", "short.txt"), spoil=lambda d: d.text("What is", "short.txt")),
    Mistake("calibration text that is empty", "empty.txt", "expected text", "an empty file", "Write",
            argv=("quantize", "model", "--out", "out", "--method", "awq", "--calibration", "empty.txt"),
            spoil=lambda d: d.text("", "empty.txt")),
    Mistake("calibration that is not used", "--calibration", "looks at weights alone", "rtn", "Leave them out",
            argv=("quantize", "model", "--out", "out", "--method", "rtn", "--calibration", "train.jsonl")),
    Mistake("perplexity of rows without text", "train.jsonl:1", "expected a column 'text'", "prompt, chosen", "Rename",
            argv=("eval", "model", "--perplexity", "train.jsonl")),
    Mistake("no recipe", "nowhere.yaml", "Expected a YAML file", "no file of that name", "fastpost recipes ls",
            argv=("train", "nowhere.yaml")),
    Mistake("a folder for a recipe", "model", "expected a recipe", "a folder", "Give a YAML file", argv=("train",
            "model")),
    Mistake("options without a recipe", "--optim.lr", "expected a recipe first", "--optim.lr",
            "Write RECIPE --optim.lr",
            argv=("train", "--optim.lr", "1")),
    Mistake("misspelt option", "--optim.lrr", "unknown option", "lrr", "Did you mean", argv=other("--optim.lrr", "1")),
    Mistake("option without group", "--lr", "unknown option", "--lr", "'--optim.lr'", argv=other("--lr", "1")),
    Mistake("option without value", "--optim.lr", "expected a value", "nothing", "Write --optim.lr VALUE",
            argv=other("--optim.lr")),
    Mistake("no dashes", "command line", "expected --group.key", "'optim.lr'", "Write --optim.lr VALUE",
            argv=other("optim.lr=1")),
    Mistake("option of the wrong type", "--optim.lr", "expected a number", "a string 'fast'", "such as",
            argv=other("--optim.lr", "fast")),
    Mistake("broken list", "--log.samples", "expected a YAML list", "'[a: b'", "Put quotes",
            argv=other("--log.samples", "[a: b")),
    Mistake("eval without value", "eval", "--model: expected a folder", "nothing", "--model FOLDER",
            argv=("eval", "r.yaml", "--model")),
    Mistake("unknown recipe", "recipes", "there is no recipe", "'simppo'", "Did you mean 'simpo'",
            argv=("recipes", "cp", "simppo")),
    Mistake("recipes verb", "recipes", "expected ls or cp NAME", "'rm x'", "fastpost recipes ls",
            argv=("recipes", "rm", "x")),
    Mistake("recipe exists", "r.yaml", "expected a new file", "exists", "Name another",
            argv=("recipes", "cp", "simpo", "r.yaml")),
    Mistake("plot of no run", "[plot] model", "expected a run folder", "none", "Is the path right", argv=("plot",
            "model")),
    Mistake("export of no run", "[export] model", "expected a run folder", "none", "Give the folder",
            argv=("export", "model", "out")),
    Mistake("generate without prompt", "generate", "expected a prompt", "no prompt", "--file",
            argv=("generate", "model", "--file", "empty.jsonl"), spoil=lambda d: d.text("", "empty.jsonl")),
    Mistake("generate from a broken row", "p.jsonl:2", "expected an object with 'prompt'", "question", "Rename",
            argv=("generate", "model", "--file", "p.jsonl"),
            spoil=lambda d: d.text('{"prompt": "x"}\n{"question": "y"}\n', "p.jsonl")),
    # ---- the recipe ----
    Mistake("misspelt key", "r.yaml", "unknown key 'optim.lrr'", "lrr", "Did you mean 'lr'",
            spoil=lambda d: d.recipe(RECIPE + "optim: {lrr: 1}\n")),
    Mistake("misspelt group", "r.yaml", "unknown key 'optimizer'", "optimizer", "Did you mean 'optim'",
            spoil=lambda d: d.recipe(RECIPE + "optimizer: {lr: 1}\n")),
    Mistake("broken YAML", "r.yaml", "expected YAML", "a mistake in line 3", "indentation",
            spoil=lambda d: d.recipe("model:\n path: x\n  train: y\n")),
    Mistake("a list for a recipe", "r.yaml", "expected groups (model, data", "a list", "fastpost recipes cp",
            spoil=lambda d: d.recipe("- model\n- data\n")),
    Mistake("key twice", "r.yaml", "line 7", "'lr' is written twice", "Keep one",
            spoil=lambda d: d.recipe(RECIPE + "optim:\n  lr: 1\n  lr: 2\n".replace("optim:\n", "optim:\n"))),
    Mistake("wrong type", "r.yaml: optim.lr", "expected a number", "a string 'fast'", "such as",
            spoil=lambda d: d.recipe(RECIPE + "optim: {lr: fast}\n")),
    Mistake("wrong choice", "r.yaml: optim.schedule", "expected one of cosine", "'cosin'", "Did you mean 'cosine'",
            spoil=lambda d: d.recipe(RECIPE + "optim: {schedule: cosin}\n")),
    Mistake("a value for a group", "r.yaml: optim", "expected a group of keys", "a number", "Write",
            spoil=lambda d: d.recipe(RECIPE + "optim: 3\n")),
    Mistake("too small", "r.yaml: train.batch_size", "at least 1", "got 0", "Set", argv=TRAIN,
            spoil=lambda d: d.recipe(RECIPE.replace("threads: 1", "batch_size: 0"))),
    Mistake("no model named", "r.yaml: model.path", "expected a path", "got nothing", "--model.path PATH",
            spoil=lambda d: d.recipe(RECIPE.replace("path: model", "path: "))),
    Mistake("prompt fills the row", "data.max_prompt_length", "less than data.max_length (8)", "got 8", "Lower it",
            argv=other("--data.max_length", "8", "--data.max_prompt_length", "8")),
    Mistake("sharing without packing", "data.share_prompt", "expected false", "'sdpa'",
            "Set data.share_prompt to false",
            argv=other("--model.attention", "sdpa")),
    Mistake("samples of nothing", "log.samples", "data.eval", "got 2", "Set data.eval", argv=other("--log.samples",
            "2")),
    # ---- the objective ----
    Mistake("unknown objective", "objective", "expected one of", "'simppo'", "Did you mean 'simpo'",
            argv=other("--objective.name", "simppo")),
    Mistake("unknown hyperparameter", "SimPO", "no such field", "gama", "SimPO has beta, gamma_beta_ratio",
            argv=other("--objective.gama", "1")),
    Mistake("hyperparameter out of range", "[SimPO] beta", "expected a finite number", "got -1", "above 0",
            argv=other("--objective.beta", "-1")),
    Mistake("no reference", "model.reference", "needs log-probs of a reference", "'none'", "Use start",
            argv=other("--objective.name", "dpo", "--model.reference", "none")),
    Mistake("reference that is no folder", "model.reference", "the folder of a model", "'nowhere'", "Correct the path",
            argv=other("--objective.name", "dpo", "--model.reference", "nowhere")),
    # ---- the data ----
    Mistake("no data file", "data.train", "expected a .jsonl, .json or .parquet file", "nowhere.jsonl", "path",
            argv=other("--data.train", "nowhere.jsonl")),
    Mistake("no held-out file", "data.eval", "expected a .jsonl, .json or .parquet file", "nowhere.jsonl", "path",
            argv=other("--data.eval", "nowhere.jsonl")),
    Mistake("another kind of file", "r.csv", "expected a file named .jsonl", "'.csv'", "Convert",
            argv=other("--data.train", "r.csv"), spoil=lambda d: d.text("a,b\n", "r.csv")),
    Mistake("no rows", "train.jsonl", "expected rows", "no rows", "Write one object a line",
            spoil=lambda d: d.text("\n\n")),
    Mistake("broken JSON", "train.jsonl:2", "expected JSON", "broken JSON", "Correct or remove it",
            spoil=lambda d: d.text(json.dumps(PAIR) + '\n{"prompt": \n')),
    Mistake("not an object", "train.jsonl:1", "expected an object with columns", "list", "Write {...}",
            spoil=lambda d: d.text("[1, 2]\n")),
    Mistake("missing column", "train.jsonl:1", "column 'rejected'", "the row has: prompt, chosen",
            "Rename another with data.columns",
            spoil=lambda d: d.rows([without(PAIR, "rejected")])),
    Mistake("column of another name", "train.jsonl:1", "column 'question'", "prompt", "Known",
            argv=other("--data.columns", "{prompt: question}")),
    Mistake("null in a column", "train.jsonl:1", "column 'chosen'", "null", "Fill it in",
            spoil=lambda d: d.rows([PAIR | {"chosen": None}])),
    Mistake("two formats in a row", "train.jsonl:1", "column 'chosen'", "'rejected' is a string", "same format in both",
            spoil=lambda d: d.rows([PAIR | {"rejected": "no"}])),
    Mistake("two formats in a file", "train.jsonl:2", "strings and message lists are mixed", "mixed", "one of them",
            spoil=lambda d: d.rows([PAIR, PLAIN])),
    Mistake("a number for text", "train.jsonl:1", "expected a string or a list of messages", "int", "Write",
            spoil=lambda d: d.rows([PAIR | {"prompt": 3}])),
    Mistake("message without role", "train.jsonl:1: chosen[0]", "expected {'role', 'content'}", "text", "Rename",
            spoil=lambda d: d.rows([PAIR | {"chosen": [{"text": "x"}]}])),
    Mistake("no prompt in the pair", "train.jsonl:1", "no column 'prompt'", "share no first message", "Add the column",
            spoil=lambda d: d.rows([{"chosen": [USER, REPLY], "rejected": [REPLY]}])),
    Mistake("reply by the user", "train.jsonl:1", "expected the assistant's reply", "role 'user'", "Move",
            argv=other("--objective.name", "sft"), spoil=lambda d: d.rows([{"prompt": [USER], "completion": [USER,
            REPLY]}])),
    Mistake("a .parquet that is none", "x.parquet", "expected a parquet file", "something else", "Write it again",
            argv=other("--data.train", "x.parquet"), spoil=lambda d: d.text("no", "x.parquet")),
    Mistake("pairs for a single-reply objective", "train.jsonl:1", "single replies", "pairs (chosen, rejected)",
            "data.columns", argv=other("--objective.name", "sft")),
    Mistake("unknown columns", "train.jsonl:1", "Expected one of", "a, b", "data.columns",
            argv=other("--objective.name", "sft"), spoil=lambda d: d.rows([{"a": 1, "b": 2}])),
    Mistake("label that is none", "train.jsonl:1", "expected true or false", "'good'", "Write",
            argv=other("--objective.name", "kto"),
            spoil=lambda d: d.rows([{"prompt": "a", "completion": "b", "label": "good"}])),
    Mistake("reference columns missing", "train.jsonl:1", "column 'reference_chosen_logps'", "the row has",
            "model.reference",
            argv=other("--objective.name", "dpo", "--model.reference", "columns")),
    Mistake("every row dropped", "train.jsonl", "every row was dropped", "prompt fills max_length", "data.max_length",
            argv=other("--data.max_length", "4")),
    Mistake("text with a template in it", "train.jsonl:1", "give messages or bare text", "stands in the middle",
            "bare text",
            spoil=lambda d: (shutil.rmtree(d.path / "model"), tiny.folder(d.path / "model", template=tiny.LLAMA3),
                             d.rows([PAIR | {"prompt": [{"role": "user", "content": "<|bos|>What?"}]}]))),
    # ---- the model ----
    Mistake("no such folder", "model.path", "Expected a local Hugging Face folder", "nowhere", "hf download",
            argv=other("--model.path", "nowhere")),
    Mistake("no config.json", "model.path", "expected a Hugging Face model folder", "no config.json", "hf download",
            spoil=lambda d: (d.path / "model/config.json").unlink()),
    Mistake("a pickle", "model", "only safetensors", "pytorch_model.bin is a pickle", "Convert it",
            spoil=lambda d: (d.path / "model/model.safetensors").rename(d.path / "model/pytorch_model.bin")),
    Mistake("no weights", "model", "expected model*.safetensors", "none", "hf download",
            spoil=lambda d: (d.path / "model/model.safetensors").unlink()),
    Mistake("weights cut short", "model.safetensors", "expected a safetensors file", "cut short", "Fetch it again",
            spoil=lambda d: (d.path / "model/model.safetensors").write_bytes(b"\x90" * 40)),
    Mistake("broken config.json", "config.json", "expected JSON with a model_type", "something else",
            "Fetch it again", spoil=lambda d: d.text("{", "model/config.json")),
    Mistake("unknown architecture", "model.path", "expected a causal language model", "'no_such_model'",
            "newer transformers",
            spoil=lambda d: d.config(model_type="no_such_model", architectures=["NoSuchModel"])),
    Mistake("no tokenizer", "model.path", "expected a tokenizer", "none", "tokenizer.json",
            spoil=lambda d: [f.unlink() for f in (d.path / "model").glob("*token*")]),
    Mistake("config of another model", "model", "missing keys", "layers.2", "do not fit",
            spoil=lambda d: d.config(num_hidden_layers=3, layer_types=["full_attention"] * 3)),
    Mistake("weights that are NaN", "model", "expected finite weights", "NaN", "Fetch the folder again",
            spoil=lambda d: nan_weights(d.path / "model")),
    Mistake("no chat template", "train.jsonl:1", "chat template", "this tokenizer has no", "plain strings",
            spoil=lambda d: d.template(None)),
    Mistake("template without generation prompt", "train.jsonl:1", "no generation prompt", "'<|im_start|>assistant",
            "Add", spoil=lambda d: d.template(tiny.NO_GENERATION_PROMPT)),
    Mistake("a GPU that is not there", "train.device", "expected a CUDA GPU", "none", "Use cpu or auto",
            argv=other("--train.device", "cuda")),
    Mistake("attention of no name", "model.attention", "expected packed", "'flash'", "sdpa",
            argv=other("--model.attention", "flash", "--data.share_prompt", "false")),
    # ---- the run folder ----
    Mistake("a file for a folder", "train.output_dir", "expected a folder", "the file", "Choose another",
            argv=other("--train.output_dir", "train.jsonl")),
    Mistake("somebody's folder", "train.output_dir", "no run of fastpost", "not empty", "choose another folder",
            argv=other("--train.output_dir", "model")),
    Mistake("other settings", "train.output_dir", "other settings", "optim.lr is 1e-06 there, 1.0 now",
            "choose another",
            argv=other("--train.max_steps", "1", "--optim.lr", "1"), spoil=run_once),
    Mistake("never resume", "train.resume", "resume is 'never'", "already holds a run", "Choose another folder",
            argv=other("--train.max_steps", "1", "--train.resume", "never"), spoil=run_once),
    Mistake("tracker that is not installed", "log.to", "expected installed packages", "trackio", "pip install trackio",
            argv=other("--log.to", "trackio"), spoil="trackio"),
]  # fmt: skip


def nan_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("messages") / "model")


@pytest.fixture
def desk(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTPOST_TRACEBACK", raising=False)
    shutil.copytree(model, tmp_path / "model")
    desk = Desk(tmp_path)
    desk.rows([PAIR])
    desk.recipe(RECIPE)
    return desk


def test_there_are_enough():
    assert len(MISTAKES) >= 40 and len({m.name for m in MISTAKES}) == len(MISTAKES)


def test_the_desk_is_in_order(desk):
    before = torch.get_num_threads()
    try:
        assert main([*TRAIN]) == 0  # so each mistake is the only one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_message(desk, capsys, monkeypatch, mistake):
    if mistake.spoil == "trackio":
        from fastpost.train import sinks

        monkeypatch.setattr(sinks, "find_spec", lambda _: None)
    elif mistake.spoil:
        mistake.spoil(desk)
    capsys.readouterr()
    before = torch.get_num_threads()
    try:
        status = main([*mistake.argv])
    finally:
        torch.set_num_threads(before)
    err = capsys.readouterr().err
    message = err.strip().splitlines()[-1] if err.strip() else ""
    print(f"{mistake.name}: {err}")
    assert status in (1, 2) and err.startswith("fastpost: ") and "Traceback" not in err
    missing = {part: text for part in ("where", "what", "got", "do") if (text := getattr(mistake, part)) not in err}
    assert not missing, f"{missing} not in: {err}"
    assert message.rstrip()[-1] in ".?)'…" or mistake.do in message


def test_out_of_gpu_memory_is_a_sentence(desk, capsys, monkeypatch):
    from fastpost.train import loop

    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(loop, "train", full)
    assert main([*TRAIN]) == 1
    err = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB. Lower train.max_tokens_per_micro_batch" in err and "more" not in err


def test_a_file_that_cannot_be_written(desk, capsys, monkeypatch):
    from fastpost.cli import recipes

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "simpo.yaml")

    monkeypatch.setattr(recipes, "open", refused, raising=False)
    assert main(["recipes", "cp", "simpo"]) == 1
    assert capsys.readouterr().err == "fastpost: [Errno 13] Permission denied: 'simpo.yaml'\n"
