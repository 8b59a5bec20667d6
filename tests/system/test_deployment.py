"""The deployment's files are read by the tools they are for, and the server's image holds what it should."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]


def compose(*arguments, **environment):
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["docker-compose", *arguments], cwd=ROOT, env=given | environment, capture_output=True, text=True, check=False
    )


def services(**environment):
    done = compose("config", GRAFANA_ADMIN_PASSWORD="secret", **environment)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def test_compose_reads_the_file_and_sees_every_service():
    found = services()
    assert set(found) == {"server", "server-gpu", "prometheus", "grafana"}
    assert {name: service["profiles"] for name, service in found.items() if "profiles" in service} == {
        "server-gpu": ["gpu"]
    }, "the GPU is asked for by its profile, and nothing else is"


def test_compose_refuses_to_start_grafana_with_no_password():
    done = compose("config")
    assert done.returncode != 0
    assert "GRAFANA_ADMIN_PASSWORD" in done.stderr


def test_what_is_not_committed_comes_from_the_environment():
    given = services(OFFRAMP_API_KEY="a key of ours", OFFRAMP_BUNDLES="/srv/bundles")
    assert given["server"]["environment"]["OFFRAMP_API_KEY"] == "a key of ours"
    assert given["server"]["volumes"] == ["/srv/bundles:/bundle:ro"]
    assert given["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "secret"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Carry out the server image's install steps, for CPUs, in a folder instead of an image."""
    root = tmp_path_factory.mktemp("image")
    context, offramp = root / "context", root / "offramp"
    for name in re.findall(r"^COPY ([\w.]+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        context.mkdir(exist_ok=True)
        copy(ROOT / name, context / name)
    for name in ("README.md", "constraints.txt"):
        shutil.copy(ROOT / name, context / name)
    places = {"/opt/offramp": offramp, "/opt/build": root / "build", "/wheel": root / "wheel"}
    for step in install_steps("wheel", "requirements", "server-dependencies", "server"):
        command = step
        for inside, outside in places.items():
            command = re.sub(rf"(?<![\w/]){inside}(?=[/\s]|$)", str(outside), command)
        run = ["bash", "-euc", command]
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {"VARIANT": "cpu"}
        done = subprocess.run(run, cwd=context, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return offramp


def install_steps(*stages):
    """Give the commands of the Dockerfile's stages that concern Python, in order."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    for stage in stages:
        body = re.search(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        for command in re.findall(r"^RUN (.*)$", body, re.MULTILINE):
            if "python3" in command or "pip" in command:
                yield re.sub(r"--mount=\S+ *", "", command).strip()


def test_the_servers_image_serves(image):
    done = subprocess.run([image / "bin" / "offramp", "serve", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout


def test_the_servers_image_imports_the_server_whole(image):
    code = "import offramp_server.app, offramp_server.metrics, offramp_server.engine; print('imported')"
    done = subprocess.run([image / "bin" / "python", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("module", ["torch", "onnxscript", "sklearn", "pytest"])
def test_the_servers_image_lacks_what_only_an_exporter_needs(image, module):
    code = f"import importlib.util; print(importlib.util.find_spec({module!r}))"
    done = subprocess.run([image / "bin" / "python", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr
