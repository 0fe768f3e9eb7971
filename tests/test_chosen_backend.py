import gc

from tiny_checkpoint import write_tiny_folder

from qwen.chosen_backend import load_chosen_backend
from qwen.load_options import LoadOptions


def test_full_collections_do_not_look_at_what_was_loaded(tmp_path):
    gc.unfreeze()
    backend = load_chosen_backend(str(write_tiny_folder(tmp_path)), LoadOptions(device="cpu"), None)
    try:
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10
    finally:
        backend.close()
        gc.unfreeze()
