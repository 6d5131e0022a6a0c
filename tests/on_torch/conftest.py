"""Cells whose flag is torch:triton take their result from one process in which Triton interprets its kernels."""

import os

import pytest

from helpers import interpreter

_FOLDER = pytest.StashKey()

if interpreter.ON:
    interpreter.patch_once()


@pytest.fixture(scope="session", autouse=True)
def _folder_of_all_processes(request, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder of its own in one that they share.
    request.config.stash[_FOLDER] = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


# Before pytest-xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    left = interpreter.deselected(items)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    for item in filter(interpreter.is_interpreted, items):
        item.add_marker(pytest.mark.xdist_group(interpreter.GROUP))


def pytest_runtest_logreport(report):
    interpreter.store(report.nodeid, report)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if interpreter.ON or not interpreter.is_interpreted(pyfuncitem):
        return None
    results = interpreter.results(pyfuncitem.session, pyfuncitem.config.stash[_FOLDER])
    text = results[interpreter.cell(pyfuncitem)]
    if text.startswith("skipped: "):
        pytest.skip(text)
    if text:
        pytest.fail(text, pytrace=False)
    return True
