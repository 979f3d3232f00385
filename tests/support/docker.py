"""What tests ask of a Docker engine. Where one is lacking, they skip and say what."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the docker program and give what it says, whether it succeeds or not."""
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=600, check=False)


def require_images(*images: str) -> None:
    """Skip the test where there is no engine, or one of the images is neither here nor to be had."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker program here")
    if (answer := docker("info", "--format", "{{.ServerVersion}}")).returncode:
        pytest.skip(f"no Docker engine answers: {answer.stderr.strip()}")
    for image in images:
        if docker("image", "inspect", image).returncode and (pulled := docker("pull", "--quiet", image)).returncode:
            pytest.skip(f"image {image} is neither here nor to be had: {pulled.stderr.strip()}")
