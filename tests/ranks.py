"""Functions that tests run on all ranks of a gang; a module, as they travel by name."""

import gc

import torch

from q3q.models import checkpoint, tensor_files


def parameter_bytes(team):
    """Return the bytes of the parameters of all models that each rank keeps."""
    models = list(team.models.values())
    shares = [part for m in models for share in m._shares.values() for part in share.values()]
    kept = sum(model.norm_H.nbytes for model in models)
    return team.gather(kept + sum(part.ds_tensor.nbytes for part in shares))


def live_bytes(team):
    """Return the bytes of all live tensors in each rank's process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            # The garbage collector does not list the share of a DeepSpeed parameter by itself.
            for tensor in (item, getattr(item, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    storages[tensor.untyped_storage().data_ptr()] = (
                        tensor.untyped_storage().nbytes()
                    )
    return team.gather(sum(storages.values()))


_states = checkpoint.Checkpoint.states
_read: list[int] = []  # bytes, of each read of this rank


def count_reads(team):
    """Count the bytes that this rank reads of tensors from now on."""
    plain = tensor_files.StoredTensor._fill

    def counted(self, file, piece, position):
        plain(self, file, piece, position)
        _read.append(len(piece))

    tensor_files.StoredTensor._fill = counted  # type: ignore[method-assign]


def bytes_read(team):
    """Return the bytes that each rank has read since it was last asked."""
    count = sum(_read)
    _read.clear()
    return team.gather(count)


def see_other_files(team):
    """Let all ranks but the first see other files than rank 0, as on a disk of their own."""
    if team.rank:
        checkpoint.Checkpoint.states = lambda self: {}  # type: ignore[method-assign]


def see_the_same_files(team):
    """Undo `see_other_files`."""
    checkpoint.Checkpoint.states = _states  # type: ignore[method-assign]


def known_models(team):
    return team.gather(len(team.models))
