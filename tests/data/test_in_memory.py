import torch
import torch.nn.functional as F
from small_sets import ALONE, digits, listed, same

AUGMENTED = {"crop_padding": 2, "flip": True, "cutout": 3}


def augmented_and_plain(seed=0, epoch=1, step=0, **augmentation):
    """The same training batch with and without augmentation."""
    datasets = digits(seed=seed, data={"batch_size": 64, **augmentation}), digits(seed=seed)
    return [listed(dataset.train_batches(epoch, ALONE), step + 1)[step][0] for dataset in datasets]


def test_flip_mirrors_some_images_and_leaves_the_rest():
    augmented, plain = augmented_and_plain(flip=True)
    mirrored = (augmented == plain.flip(-1)).flatten(1).all(1)
    untouched = (augmented == plain).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 16 <= mirrored.sum() <= 48


def test_augmentation_is_drawn_anew_for_each_seed_epoch_and_step():
    def mirrored(**place):
        augmented, plain = augmented_and_plain(flip=True, **place)
        return tuple((augmented != plain).flatten(1).any(1).tolist())

    assert len({mirrored(), mirrored(seed=1), mirrored(epoch=2), mirrored(step=1)}) == 4


def test_a_crop_is_a_window_of_the_padded_image_at_every_offset():
    augmented, plain = augmented_and_plain(crop_padding=1)
    padded = F.pad(plain, [1] * 4)
    windows = {(r, c): padded[:, :, r : r + 8, c : c + 8] for r in range(3) for c in range(3)}
    found = {offset: (augmented == window).flatten(1).all(1) for offset, window in windows.items()}
    assert torch.stack(list(found.values())).any(0).all()
    assert all(matches.any() for matches in found.values())


def test_cutout_sets_one_square_to_the_mean_and_nothing_else():
    augmented, plain = augmented_and_plain(cutout=3)
    changed = (augmented != plain).squeeze(1)
    assert (augmented.squeeze(1)[changed] == 0).all()
    for lines in (rows := changed.any(2), columns := changed.any(1)):
        assert set(lines.sum(1).tolist()) == {2, 3}  # two where the centre is on the border
        assert {0, 7} <= set(lines[lines.sum(1) == 2].nonzero()[:, 1].tolist())
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])


def test_only_training_images_are_augmented():
    augmented, plain = digits(data={"batch_size": 64, **AUGMENTED}), digits()
    for split in ("validation", "test", "train"):
        batches, expected = (listed(dataset.evaluation_batches(split, ALONE)) for dataset in (augmented, plain))
        assert same(batches, expected)
    assert same(augmented.saliency_batches(64), plain.saliency_batches(64))
