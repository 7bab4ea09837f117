# SPDX-License-Identifier: BSD-3-Clause
"""Tests the promises of SECURITY.md for running code and for sources: no network, no shell, no pickle."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdgp

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sdgp.cmake_prefix_path)

# Python raises an audit event before each of these actions. Exit, because code could catch an exception. Python's
# platform.platform() runs `uname -p`.
REFUSE = """
import os, sys, traceback

def refuse(event, arguments):
    program = event == "subprocess.Popen" and arguments[0] not in ("git", "uname")
    if program or event in ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system") or (
        event.startswith(("socket.", "urllib.", "http.", "pickle.")) and event != "socket.gethostname"
    ):
        traceback.print_stack()
        print(f"refused: {event}", file=sys.stderr, flush=True)
        os._exit(97)

sys.addaudithook(refuse)
"""

# Imports torch first: its actions during import are not sdgp's.
PROGRAM = f"""
import sys, torch, torch._dynamo
from pathlib import Path
{REFUSE}
import sdgp
import sdgp_cli
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 16))
sdgp.convert(model, "2:4", backend="pruned")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
schedule = sdgp.Schedule(model, exact_first=1, patterns={{1: "1:4"}})
for _ in range(2):
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    schedule.step()
print(sdgp.report(model), sdgp.profile(model, torch.randn(4, 3, 8, 8), rounds=1))
sdgp.revert(model)

assert sdgp_cli.main(["doctor", "--json"]) == 0
Path("net.py").write_text("import torch\\ndef make(): return torch.nn.Linear(64, 64)")
assert sdgp_cli.main(["profile", "net.py:make", "--input", "2x64", "--rounds", "1"]) == 0

try:
    import rich, safetensors
except ImportError:
    sys.exit()
sys.path.insert(0, {str(ROOT)!r})
from recipes.common import checkpoint
checkpoint.save(Path("x.safetensors"), model.state_dict(), {{"step": 3, "tensor": torch.ones(2)}})
assert checkpoint.load(Path("x.safetensors")).training["step"] == 3
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


def test_runs_without_network_shell_and_pickle(tmp_path: Path) -> None:
    result = run(PROGRAM, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import pickle; pickle.loads(pickle.dumps(print))",
    ],
)
def test_the_hook_refuses(program: str, tmp_path: Path) -> None:
    assert run(REFUSE + program, tmp_path).returncode == 97


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_the_libraries_call_neither_network_nor_programs() -> None:
    for library in (PACKAGE / "lib" / "libsdgp.so", *PACKAGE.glob("_C*.so")):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        called = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
        assert "memcpy" in called
        forbidden = r"socket|connect|getaddrinfo|gethostby.*|system|popen|fork|exec.*|posix_spawnp?|dlopen"
        assert {name for name in called if re.fullmatch(forbidden, name)} == set()


# The sources of the installed package and of the recipes.

MODULES = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"),
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "xmlrpc", "socketserver"),
    *("subprocess", "pty", "code", "codeop"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "os.fork", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load"),
}
ALLOWED = {
    ("python/sdgp/_machine.py", "import of subprocess"),  # reads the git commit for a measurement
    ("recipes/cifar10/data.py", "import of pickle"),  # for an exception; torchvision compares the hashes
}


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import of {x.name}" for x in node.names if x.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 0 and name.split(".")[0] in MODULES:
                yield f"import of {name}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in CALLS or name.startswith(("os.exec", "os.spawn")):
                yield f"call of {name}"
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            for key, value in (("shell", "False"), ("trust_remote_code", "False"), ("allow_pickle", "False")):
                if keywords.get(key, value) != value:
                    yield f"{key}={keywords[key]}"
            if name.endswith(".from_pretrained") and "use_safetensors" not in source:
                yield "from_pretrained without use_safetensors"


def test_sources() -> None:
    files = [*(ROOT / "python").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 40
    found = {(str(file.relative_to(ROOT)), fault) for file in files for fault in faults(file.read_text())}
    assert found == ALLOWED
    data = (ROOT / "recipes/cifar10/data.py").read_text()
    assert set(re.findall(r"pickle\.\w+", data)) == {"pickle.UnpicklingError"}
    machine = ast.parse((ROOT / "python/sdgp/_machine.py").read_text())
    programs = [
        ast.unparse(x.value) for x in ast.walk(machine) if isinstance(x, ast.Assign) and isinstance(x.value, ast.List)
    ]
    assert programs == ["['git', '-C', str(repository), *arguments]"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "import os.path, socket",
        "eval(text)",
        "os.system('ls')",
        "os.execv('ls', [])",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_faults_are_found(source: str) -> None:
    assert list(faults(source))
    assert not list(faults("torch.load(path, weights_only=True); from .requests import x; model.eval()"))
