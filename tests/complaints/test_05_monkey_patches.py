# SPDX-License-Identifier: Apache-2.0
"""Complaint 5: import order matters because a trainer patches other libraries' classes. Here: nothing of torch,
transformers or peft is another object after everything of fastpost was imported and a model was trained."""

import subprocess
import sys
from pathlib import Path

import pytest

import tiny

CHILD = """
import importlib, pkgutil, sys, types
import torch, peft, transformers
from transformers import modeling_utils, cache_utils, masking_utils, tokenization_utils_base, trainer_utils
from transformers.generation import utils
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.mixtral import modeling_mixtral
from peft.tuners import lora
import safetensors.torch, tokenizers

WATCHED = ("torch.", "transformers.", "peft.", "safetensors", "tokenizers", "yaml")

def snapshot():
    # Of every module loaded by now: its functions and classes, and what the classes are made of.
    seen = {}
    for name, module in list(sys.modules.items()):
        if module is None or not (name + ".").startswith(WATCHED) or name not in BEFORE:
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
                seen[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, inner in list(vars(value).items()):
                    if callable(inner) or isinstance(inner, (property, staticmethod, classmethod)):
                        seen[name, key, attribute] = inner
    return seen

BEFORE = set(sys.modules)
first = snapshot()
import fastpost
for found in pkgutil.walk_packages(fastpost.__path__, "fastpost."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ImportError as error:  # compat modules of peers that are not installed
            print("not imported:", found.name, error)
exec(SPOIL)
if RECIPE:
    from fastpost.cli import main
    assert main(["train", RECIPE]) == 0
second = snapshot()
changed = [key for key, value in first.items() if second.get(key) is not value]
print("watched", len(first), "changed", changed[:5])
sys.exit(bool(changed) or len(first) < 5000)
"""


def run(tmp_path, spoil="", recipe=""):
    code = f"SPOIL = {spoil!r}\nRECIPE = {str(recipe)!r}\n{CHILD}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)


def test_importing_everything_and_training_patches_nothing(tmp_path):
    tiny.folder(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.preference_rows(8))
    recipe = tiny.recipe(
        tmp_path / "r.yaml", model={"path": tmp_path / "model"}, data={"train": tmp_path / "train.jsonl"},
        objective={"name": "dpo"}, train={"output_dir": tmp_path / "run", "max_steps": 1, "threads": 1},
    )  # fmt: skip
    done = run(tmp_path, recipe=recipe)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "spoil",
    [
        "modeling_llama.LlamaAttention.forward = lambda *a: None",
        "transformers.PreTrainedModel.from_pretrained = classmethod(lambda c: None)",
        "modeling_llama.apply_rotary_pos_emb = lambda *a: None",
        "torch.nn.functional.cross_entropy = lambda *a: None",
        "lora.Linear.forward = lambda *a: None",
    ],
)
@pytest.mark.slow
def test_the_mistake_would_be_seen(tmp_path, spoil):
    done = run(tmp_path, spoil)
    assert done.returncode == 1 and "changed [(" in done.stdout, done.stderr[-800:]


def test_no_line_assigns_to_another_librarys_name():
    """The same from the source: `transformers.X.y = …`, setattr on a foreign class, or a patched sys.modules."""
    import ast

    package = Path(__file__).parents[2] / "python/fastpost"
    foreign = ("torch", "transformers", "peft", "F", "tf", "AutoModelForCausalLM", "AutoTokenizer", "sys.modules")
    allowed = {"torch.backends"}  # settings that torch offers
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [ast.unparse(t) for t in targets if isinstance(t, (ast.Attribute, ast.Subscript))]
            for name in names:
                root = name.startswith(tuple(f"{f}." for f in foreign) + ("sys.modules[",))
                assert not root or name.startswith(tuple(allowed)), f"{path}: {name} = ..."
