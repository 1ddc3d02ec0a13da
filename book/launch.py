"""Buttons that open the chapters in Colab and on Binder: where the repository's address is put, once.

    python book/launch.py https://github.com/OWNER/NAME [BRANCH]

writes the address into `_config.yml`, which makes Jupyter Book show the buttons, and puts a first cell into every chapter
that fetches the project and installs the module when the chapter is opened in Colab, and does nothing elsewhere. Without an
argument it says whether chapters and configuration agree.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

BEGIN, END = "# launch: begin\n", "# launch: end\n"
CELL = """\
# In Colab: fetch the project, install the module beside the torch that is there, and work in its book. Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess
    from pathlib import Path

    folder = Path("/content/bsmamba2")
    if not folder.exists():
        fetch = "git clone --quiet --depth 1 --branch {branch} {address}"
        subprocess.run([*fetch.split(), str(folder)], check=True)
    install = "-m pip install --quiet stempeg==0.2.6 av==18.1.0 --editable"
    subprocess.run(
        [sys.executable, *install.split(), str(folder)], check=True
    )
    sys.path.insert(0, str(folder))
    os.chdir(folder / "book")"""
"""stempeg and PyAV read the real excerpt; what else the extra `book` names, Colab has."""


def buttons(address: str, branch: str) -> str:
    """The part of `_config.yml` between its marks."""
    return f"""\
launch_buttons:
  thebe: false
  notebook_interface: jupyterlab
  binderhub_url: https://mybinder.org
  colab_url: https://colab.research.google.com

repository:
  url: {address}
  branch: {branch}
"""


def set_address(root: Path, address: str, branch: str) -> None:
    """Write configuration and cells.

    Raises:
        ValueError: for an address that is not GitHub's: neither Colab nor Binder would find it by the buttons.
    """
    if not re.fullmatch(
        r"https://github\.com/[\w.-]+/[\w.-]+", address
    ) or not re.fullmatch(r"[\w./-]+", branch):
        raise ValueError(
            f"{address!r}, {branch!r}: give https://github.com/OWNER/NAME and the name of a branch"
        )
    config = root / "_config.yml"
    before, _, rest = config.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    config.write_text(
        before + BEGIN + buttons(address, branch) + END + after,
        encoding="utf-8",
    )
    source = CELL.format(address=address, branch=branch).splitlines(
        keepends=True
    )
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "launch",
        "metadata": {"tags": ["remove-cell"]},
    }
    for path in chapters(root):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [
            one for one in notebook["cells"] if one["id"] != "launch"
        ]
        notebook["cells"].insert(
            0, {**cell, "outputs": [], "source": source}
        )
        path.write_text(
            json.dumps(notebook, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def disagreements(root: Path) -> list[str]:
    """What is wrong; nothing while no address is set and no chapter has the cell."""
    part = (
        (root / "_config.yml")
        .read_text(encoding="utf-8")
        .partition(BEGIN)[2]
        .partition(END)[0]
    )
    found = re.search(
        r"^  url: (\S+)\n  branch: (\S+)$", part, re.MULTILINE
    )
    wanted = (
        CELL.format(address=found[1], branch=found[2]) if found else None
    )
    said = []
    for path in chapters(root):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        has = [
            "".join(cell["source"])
            for cell in cells
            if cell["id"] == "launch"
        ]
        if has != ([wanted] if wanted else []):
            said.append(
                f"{path.name}: its first cell is not that of the address in _config.yml: run book/launch.py"
            )
    return said


def chapters(root: Path) -> list[Path]:
    """The notebooks that a reader may open."""
    return sorted((root / "book").glob("*.ipynb"))


if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[1]
    if len(sys.argv) > 1:
        set_address(
            folder,
            sys.argv[1],
            sys.argv[2] if len(sys.argv) > 2 else "main",
        )
    sys.exit("\n".join(disagreements(folder)) or 0)
