"""The container files hold together: with each other, and with the tree they are built from."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def stages():
    """Give the Dockerfile's stages: what each starts from, its name, its instructions."""
    return re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)


def stage(name):
    (body,) = [body for _, found, body in stages() if found == name]
    return body


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_base_image_is_pinned_by_its_version():
    names = {name for _, name, _ in stages()}
    foreign = [source for source, _, _ in stages() if source not in names and "$" not in source]
    assert len(foreign) == 2
    assert all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", image) for image in foreign)


@pytest.mark.parametrize("target", ["server", "exporter"])
def test_an_image_runs_as_nobody_special(target):
    assert re.search(r"^USER [1-9]\d+$", stage(target), re.MULTILINE)


def test_the_servers_image_asks_the_engine_for_its_health():
    assert "HEALTHCHECK" in stage("server")
    assert "/v2/health/ready" in stage("server")
    compile(re.search(r'"-c", "(.*?)"\]', stage("server").replace("\\\n", ""))[1], "healthcheck", "exec")


def test_only_the_exporters_image_installs_what_exporting_needs():
    assert "export.txt" in stage("exporter-dependencies")
    assert "calibrate.txt" in stage("exporter-dependencies")
    assert "export" not in stage("server-dependencies") + stage("server")


def test_the_build_sees_what_it_copies_and_no_more():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name for names in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for name in names.split()
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {Path(package).parts[0] for package in packages["packages"]} <= copied


def test_nothing_is_reachable_from_beyond_this_machine():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_what_is_mounted_from_the_tree_is_there_and_read_only():
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", [])]
    from_tree = [mount for mount in mounts if mount.split(":")[0] not in COMPOSE["volumes"]]
    assert all(mount.endswith(":ro") for mount in from_tree)
    for mount in from_tree:
        if mount.startswith("./"):
            assert (ROOT / mount.split(":")[0]).exists(), mount


def test_no_secret_is_written_down():
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|KEY|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:[-?].*\}", value), name
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_gpu_server_reserves_a_gpu_and_starts_on_demand():
    server = SERVICES["server-gpu"]
    assert server["profiles"] == ["gpu"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert server["build"]["args"] == {"VARIANT": "gpu"}
    assert "deploy" not in SERVICES["server"]


def test_prometheus_asks_the_services_that_there_are():
    config = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (source,) = job["dns_sd_configs"]
    assert set(source["names"]) == {name for name in SERVICES if name.startswith("server")}
    assert f"EXPOSE {source['port']}" in stage("server")
    assert all((ROOT / "dashboards" / "prometheus" / name).is_file() for name in config["rule_files"])


def test_grafana_finds_its_data_and_its_dashboard_where_they_are():
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in SERVICES["grafana"]["volumes"])
    provisioning = ROOT / "dashboards" / "grafana"
    assert mounts["./dashboards/grafana"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "offramp.yml").read_text())["providers"]
    assert fnmatch(mounts["./dashboards/offramp.json"], f"{provider['options']['path']}/*.json")
    interval = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == interval["scrape_interval"]
