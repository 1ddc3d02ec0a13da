"""Every command on the pages about installing and training is in one list, which says how it is checked."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tomllib
from pathlib import Path

import papermill.cli
import pytest
import torch.distributed.run
from pip._internal.commands import create_command
from rehearsal import EVALUATE, ROOT, SEPARATE, TRAIN, make_musdb, start

from bsmamba2.cli.main import COMMANDS, main
from bsmamba2.training.job import JobConfig

PAGES = (
    "book/installation.md", "book/troubleshooting.md", "book/12_training.ipynb", "book/15_scaling.ipynb",
    "notebooks/train.ipynb",
)  # fmt: skip
COST = "bsmamba2 cost --batch 5 --precision bfloat16 --gradient-checkpointing"
NODES = "--master-addr machine-0 --master-port 29500 -m bsmamba2 train ..."
CONV1D = "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation --no-cache-dir causal-conv1d"
TINY = (
    "--preset small --dim 16 --depth 1 --segment 0.5 --batch 1 --grad-accum-steps 1 --loss-hop 441 --steps 2"
    " --save-every 1 --validate-every 2 --validation-windows 2 --workers 1 --backend plain --no-tensorboard"
)
RUN = {
    TRAIN: TINY,
    EVALUATE: "--segments '' --backend plain",
    SEPARATE: "--backend plain",
    "bsmamba2 separate song.mp3 -o separated": "--backend plain --checkpoint runs/paper/best.safetensors",
}
"""Run in a small folder of songs, in this order, with these options added."""
PARSED = {
    COST,
    "bsmamba2 backends",  # run by tests/cli/test_backends_command.py
    "torchrun --standalone --nproc-per-node 2 -m bsmamba2 train --params notebooks/params/train_paper.yaml"
    " --data musdb18hq",
    f"torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 {NODES}",
    f"torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 {NODES}",
    "papermill notebooks/train.ipynb out.ipynb -f notebooks/params/train_small.yaml",
    "papermill notebooks/train.ipynb book/results/first_run.ipynb -f notebooks/params/train_small.yaml",
    "make book",
    "pip install .",
    "pip install --editable .",
    "pip install --editable '.[book,test]'",
    'pip install --editable ".[book,test]"',
    "pip install setuptools wheel packaging einops",
    "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE"
    " pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1",
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1",
    CONV1D,
    "pip install tensorboard",
    "pip install einops stempeg==0.2.6",
    "pip uninstall --yes causal-conv1d",
}
"""Options, extras and files are checked, because these need a network, hours, or machines that are not here."""
NOT_CHECKED = {
    "python3 -m venv .venv", "py -3.12 -m venv .venv", "mkdir _build, book/results", "cd bsmamba2",
    "env MAMBA_FORCE_BUILD=TRUE", "env MAMBA_SKIP_CUDA_BUILD=TRUE",
    "conda env create -f environment-gpu.yml", "conda activate bsmamba2-gpu",  # see test_environment.py
    "jupyter-book build . --all -n -W --keep-going",  # in the Makefile, which runs it
    "tensorboard --logdir runs/paper",  # not among the dependencies
    'pip list | grep -i -E "torch|triton|mamba|conv1d"',
    'python -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"',
    'python -c "import torch; print(torch.cuda.get_device_capability(), torch.cuda.get_arch_list())"',
}  # fmt: skip


def commands(page: str) -> list[str]:
    """The commands in a page's blocks for a terminal: one line each, without the folder of the environment."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        markdown = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join(markdown)
    blocks = re.findall(r"^```(?:sh|powershell|ipython3)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"\n\n((?: {4}.*\n?)+)", text)
    blocks += [block for block in indented if re.match(r" +(torchrun|papermill|python|pip|make|bsmamba2) ", block)]
    lines = re.sub(r" *[\\`]\n *", " ", "\n".join(blocks)).splitlines()
    lines = [re.sub(r"\.venv/(bin|Scripts)/", "", line.strip().lstrip("%!").replace("\\", "/")) for line in lines]
    return [line.replace("python -m pip ", "pip ") for line in lines if line]


def test_every_command_of_the_pages_is_in_the_list() -> None:
    found = {command for page in PAGES for command in commands(page)}
    assert found == {*RUN, *PARSED, *NOT_CHECKED}


def test_every_option_in_the_text_about_training_on_gpus_exists() -> None:
    page = (ROOT / "book/installation.md").read_text(encoding="utf-8")
    section = page.partition("(train-on-gpus)=")[2].partition("\n## Other systems")[0]
    named = set(re.findall(r"`(--[a-z-]+)", section))
    assert "--workers" in named
    assert named <= {"--nproc-per-node", *(f"--{name.replace('_', '-')}" for name in JobConfig.names())}


@pytest.mark.parametrize("command", sorted({*PARSED, *RUN}))
def test_commands_have_options_extras_and_files_that_exist(command: str) -> None:
    program, *arguments = (word for word in shlex.split(command) if not re.match("[A-Z1_]+=", word))
    if program == "pip":
        subcommand, *rest = arguments
        _, names = create_command(subcommand).parse_args(rest)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {extra for name in names for extra in re.findall(r"\w+", name.partition("[")[2])}
        assert extras <= project["optional-dependencies"].keys()
        pinned = [name for name in names if "==" in name]
        assert all(name in (ROOT / "Makefile").read_text() + (ROOT / "pyproject.toml").read_text() for name in pinned)
    elif program == "torchrun":
        options = torch.distributed.run.parse_args(arguments)
        assert (options.module, options.training_script) == (True, "bsmamba2")
        name, *rest = options.training_script_args
        check_arguments(name, *(word for word in rest if word != "..."))
    elif program == "bsmamba2":
        check_arguments(*arguments)
    elif program == "papermill":
        context = papermill.cli.papermill.make_context(program, arguments)
        files = [context.params["notebook_path"], *context.params["parameters_file"]]
        assert all((ROOT / file).exists() for file in files)
    else:
        assert re.search(f"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def check_arguments(name: str, *arguments: str) -> None:
    """Exit unless a command of `bsmamba2` accepts these arguments."""
    parser = argparse.ArgumentParser()
    COMMANDS[name][0].add_arguments(parser)
    options = parser.parse_args(arguments)
    assert "params" not in options or (ROOT / options.params).exists()


@pytest.mark.slow
def test_the_commands_of_a_training_run_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_musdb(tmp_path, train=3, test=1, seconds=1.5)
    for command, options in RUN.items():
        if command == TRAIN:
            assert start(f"{command} {options}", tmp_path).wait(timeout=300) == 0
        else:
            assert main(shlex.split(f"{command} {options}")[1:]) == 0, command
    steps = [json.loads(line) for line in (tmp_path / "runs" / "paper" / "steps.jsonl").read_text().splitlines()]
    assert [("usdr" in step) for step in steps] == [False, True]
    assert (tmp_path / "runs" / "paper" / "best.safetensors").exists()
    assert (tmp_path / "scores" / "evaluation.json").exists()
    for folder in ("separated", "runs/paper/separated"):
        assert (tmp_path / folder / "song.vocals.wav").exists()
