"""Pytest plugin that points timm's own test-suite at our names; ``make test-timm`` runs it.

``HCVISION_NAMES`` lists the models for the tests that are parametrised over ``timm.list_models``.
``HCVISION_REDIRECT`` is what ``timm.create_model("vit_tiny_patch16_224")`` gives, for the tests that
name that model themselves; ``HCVISION_LEAST`` is how many of those have to reach it and pass.
"""

import os

import pytest
import timm
from timm.models import _registry

from hcvision.models.names import register_name

NAMES = os.environ.get("HCVISION_NAMES", "").split()
REDIRECT = os.environ.get("HCVISION_REDIRECT")
LEAST = int(os.environ.get("HCVISION_LEAST", "0"))

# Tests of the redirected files that are about something else than the model they build.
NOT_OURS = {
    "test_train_pretrained_cfg_overlay": "timm's train.py, which its sdist leaves out",
    "test_naflexvit_factory_remaps_classic_vit_checkpoint": "use_naflex=True: another architecture",
    "test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate[True]": "use_naflex=True",
    "test_export_tracks_reset_classifier_structure[vit_tiny_patch16_224-kwargs11": "use_naflex=True",
    "test_export_tracks_reset_classifier_structure[vit_tiny_patch16_224-kwargs12": "use_naflex=True",
    "test_export_tracks_reset_classifier_structure[vit_tiny_patch16_224-kwargs13": "use_naflex=True",
}

for name in [*NAMES, *filter(None, [REDIRECT])]:
    register_name(*name.rsplit("_", 1))

current: list[pytest.Item] = []
passed = set()  # of the tests that built the model; in the first process, where pytest-xdist collects the reports

if NAMES:
    every_model = timm.list_models

    def list_models(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
        """timm.list_models cut down to our names; they stand in for every module timm asks for."""
        ours = every_model(filter, exclude_filters=exclude_filters)
        return [name for name in ours if name in NAMES and not pretrained]

    timm.list_models = list_models

if REDIRECT:
    entrypoint = timm.model_entrypoint(REDIRECT)

    def redirected(*args, **kwargs):
        for item in current:
            item.user_properties.append(("reached", REDIRECT))
        return entrypoint(*args, **kwargs)

    _registry._model_entrypoints["vit_tiny_patch16_224"] = redirected


def pytest_collection_modifyitems(config, items):
    if REDIRECT:
        left_out = [item for item in items if item.name.startswith(tuple(NOT_OURS))]
    else:
        left_out = [item for item in items if not any(name in item.name for name in NAMES)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    current[:] = [item]


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed and "reached" in dict(report.user_properties):
        passed.add(report.nodeid)


def pytest_terminal_summary(terminalreporter):
    if REDIRECT:
        terminalreporter.write_line(f"{len(passed)} tests built {REDIRECT} and passed, {LEAST} expected")


def pytest_sessionfinish(session):
    if REDIRECT and len(passed) < LEAST and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
