"""A file imports, or includes, only what lies in a layer below its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blocksnap"
CSRC = ROOT / "csrc"

# Bottom to top. A package is one name: what its files import of each other is its own affair.
PYTHON_LAYERS = [
    {"errors"},
    {"database", "units"},
    {"space_policy"},
    {"_blocksnap"},
    {"_native"},
    {"dm_target"},
    {"dm_control", "dm_cookie"},
    {"mount", "metadata", "metadata_repair", "archive", "block_counters", "device_mapper", "udev", "traces"},
    {"kernel_backing"},
    {"file_system", "mount_users"},
    {"dead_mounts"},
    {"user_pool"},
    {"kernel_counters"},
    {"kernel_device"},
    {"kernel_active", "kernel_leftovers", "kernel_table"},
    {"kernel_watch"},
    {"kernel_pool"},
    {"engines"},
    {"device_export"},
    {"device_record"},
    {"catalog"},
    {"pool_files"},
    {"pool_creation", "pool_space", "pool_walk"},
    {"pool_recovery", "pool_report", "pool_transaction"},
    {"pool_changes", "pool_image"},
    {"thin_device"},
    {"pool"},
    {"shown_devices"},
    {"device_mounts"},
    {"pool_protocol"},
    {"pool_service", "remote_device"},
    {"pool_client", "pool_server"},
    {"pool_repair", "pool_scrub"},
    {"drivers", "oci"},
    {"graph_names"},
    {"graph_store"},
    {"graph_layers"},
    {"graph"},
    {"amplification"},
    {"__init__"},
    {"serve"},
    {"cli"},
    {"__main__"},
]

C_LAYERS = [
    {"blocksnap_api"},
    {"blocksnap", "disk_format"},
    {"error", "crc32c", "count_map", "grace", "seed_bug"},
    {"io", "child_process", "text_output"},
    {"io_file", "io_memory", "block_manager", "space_map", "metadata_reader"},
    {"transaction_manager"},
    {"btree"},
    {"space_map_ll"},
    {"space_map_disk", "space_map_metadata"},
    {"thin_metadata"},
    {"thin_check", "thin_delta", "thin_dump", "thin_ls", "thin_mapped", "thin_repair", "thin_usage"},
    {"map_cache"},
    {"engine"},
    {"dm_reply", "trace_names", "cow_table"},
    {"cow_nodes"},
    {"fuse_export", "mount", "loop", "confined", "io_priority", "dm_ioctl"},
    {"cow_model", "trace_text", "trace_blktrace", "trace_vscsi", "trace_srt"},
]
# One concept in several files, with a header of their own between them.
C_PARTS = {
    "thin_state": "thin_metadata",
    "thin_devices": "thin_metadata",
    "thin_rebuild": "thin_metadata",
    "thin_check_devices": "thin_check",
    "thin_check_space": "thin_check",
    "thin_check_tree": "thin_check",
    "thin_repair_roots": "thin_repair",
    "thin_repair_tree": "thin_repair",
    "thin_repair_write": "thin_repair",
    "cow_discard": "cow_model",
    "cow_metadata": "cow_model",
    "cow_write": "cow_model",
    "dm_guard": "dm_ioctl",
    "dm_cookie": "dm_ioctl",
    "data_io": "engine",
    "thin_commit": "engine",
    "thin_io": "engine",
    "thin_pool": "engine",
    "fuse_requests": "fuse_export",
}


def ranks(layers: list[set[str]]) -> dict[str, int]:
    return {name: rank for rank, layer in enumerate(layers) for name in layer}


def unit_of(path: Path) -> str:
    """Return the layer's name for a Python file: its package below blocksnap, or its own."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def is_module(name: str) -> bool:
    return any((PACKAGE / f"{name}{suffix}").exists() for suffix in ("", ".py", ".pyi"))


def imported_units(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each unit of blocksnap that a file imports ("__init__" for the package itself), and the line."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, *rest = alias.name.split(".")
                if head == "blocksnap":
                    yield (rest[0] if rest else "__init__"), node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level == 0:
                if module[0] != "blocksnap":
                    continue
                module = module[1:]
            elif node.level < depth:
                continue
            if module:
                yield module[0], node.lineno
            else:
                for alias in node.names:
                    yield (alias.name if is_module(alias.name) else "__init__"), node.lineno


def test_python_files_import_only_from_layers_below() -> None:
    rank = ranks(PYTHON_LAYERS)
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = unit_of(path)
        for unit, line in imported_units(path):
            if unit != own and rank[unit] >= rank[own]:
                upward.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {unit}")
    assert not upward, "\n".join(upward)


def test_every_python_module_has_a_layer() -> None:
    modules = {unit_of(path) for path in PACKAGE.rglob("*.py")}
    assert not modules - ranks(PYTHON_LAYERS).keys(), "add the new modules to PYTHON_LAYERS"


def test_the_compiled_module_has_one_importer() -> None:
    importers = {
        unit_of(path)
        for path in PACKAGE.rglob("*.py")
        for unit, _ in imported_units(path)
        if unit == "_blocksnap"
    }
    assert importers == {"_native"}


def included(path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = re.match(r'\s*#\s*include\s+"([^"]+)\.h"', line)
        if match:
            yield match[1], number


def c_unit(stem: str) -> str:
    return C_PARTS.get(stem, stem)


def c_files() -> list[Path]:
    return sorted(path for path in CSRC.glob("*.[ch]") if path.stem != "pending_weak")


def test_c_files_include_only_from_layers_below() -> None:
    rank = ranks(C_LAYERS)
    upward = []
    for path in c_files():
        own = c_unit(path.stem)
        for header, line in included(path):
            unit = c_unit(header)
            if unit != own and rank[unit] >= rank[own]:
                upward.append(f"{path.relative_to(ROOT)}:{line}: {own} includes {unit}")
    assert not upward, "\n".join(upward)


def test_every_c_file_has_a_layer() -> None:
    units = {c_unit(path.stem) for path in c_files()}
    assert not units - ranks(C_LAYERS).keys(), "add the new files to C_LAYERS"
