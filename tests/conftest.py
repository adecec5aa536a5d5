"""Fixtures that several test modules share."""

from tests.images import (
    debian_docker_archive,
    debian_oci_layout,
    debian_unpacked,
    image_cache,
    small_docker_archive,
    small_oci_archive,
    small_oci_layout,
    small_unpacked,
)
from tests.kernel.plugin import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_protocol,
    pytest_runtest_teardown,
    pytest_runtestloop,
    pytest_sessionfinish,
)
from tests.layer_roots import layer_root, users_root
from tests.layouts import layout

__all__ = [
    "debian_docker_archive",
    "debian_oci_layout",
    "debian_unpacked",
    "image_cache",
    "layer_root",
    "layout",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_protocol",
    "pytest_runtest_teardown",
    "pytest_runtestloop",
    "pytest_sessionfinish",
    "small_docker_archive",
    "small_oci_archive",
    "small_oci_layout",
    "small_unpacked",
    "users_root",
]
