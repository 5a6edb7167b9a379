"""A task is added as docs/extend.md says: a module, a name and a loader, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

from tracmod import tasks
from tracmod.config import TaskConfig

ROOT = Path(__file__).parent.parent.parent
LOAD = """
import json
from tracmod.config import TaskConfig
from tracmod.tasks import load_task

sizes = {"train_per_language": 10, "dev_per_language": 6, "test_per_language": 4}
data = load_task(TaskConfig(name="greetings", languages=["en", "de"], **sizes))
rows = data.train.to_pylist()
print(json.dumps([data.name, data.label_names, data.parallel, len(rows), rows[0]]))
"""


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_every_name_of_a_task_has_a_loader() -> None:
    names = get_args(TaskConfig.model_fields["name"].annotation)
    assert {*tasks._LOADERS, "planted"} == set(names)


def test_a_task_is_added_as_the_page_says(tmp_path: Path) -> None:
    package = tmp_path / "tracmod"
    for name in ("tasks", "config"):
        shutil.copytree(ROOT / "tracmod" / name, package / name)
    for name in ("__init__.py", "choices.py"):
        shutil.copy(ROOT / "tracmod" / name, package)
    page = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
    section = page.partition("## A task")[2].partition("\n## ")[0]
    module = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    (package / "tasks/greetings.py").write_text(module, encoding="utf-8")  # step 1
    replace_once(package / "config/task.py", '"files"]', '"files", "greetings"]')  # step 2
    loaders = package / "tasks/__init__.py"  # step 3
    replace_once(
        loaders,
        '    "files": load_files,\n',
        '    "files": load_files,\n    "greetings": load_greetings,\n',
    )
    replace_once(
        loaders,
        "from tracmod.tasks.marc import",
        "from tracmod.tasks.greetings import load_greetings\nfrom tracmod.tasks.marc import",
    )
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, label_names, parallel, count, first = json.loads(done.stdout)
    assert (name, label_names, parallel, count) == ("greetings", ["kind", "unkind"], True, 20)
    assert first["language"] == "en"
    assert first["text_a"].startswith(("good morning", "go away")[first["label"]])
