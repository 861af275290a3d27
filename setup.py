"""Installs the package with the native libraries that fastlstm/build.py makes.

The metadata is in pyproject.toml; this file only says when to build and how the wheel is
tagged.  They are no Python extension modules, so a wheel with any is py3-none-<platform>
and one without is py3-none-any.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """By its path: importing the package would import torch, which may not be here."""
    spec = importlib.util.spec_from_file_location("fastlstm_build", ROOT / "fastlstm/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(Command):
    """A step of ``build``; not part of build_py, whose errors editable installs swallow."""

    description = "build the native libraries"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False
        self.libraries = []

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        module = load_build_module()
        self.libraries = module.build_for_install(ROOT / "build" / "native")
        for library in self.libraries:
            package = ROOT if self.editable_mode else Path(self.build_lib)
            module.copy_library(library, package / "fastlstm")

    # What setuptools asks of a step of an editable build: nothing of ours needs linking.
    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_library", None)]


class BdistWheel(bdist_wheel):
    def run(self):
        # What an earlier build left there would travel in this wheel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        built = bool(self.get_finalized_command("build_library").libraries)
        self.root_is_pure = not built
        self.distribution.has_ext_modules = lambda: built  # platlib or purelib
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": BdistWheel})
