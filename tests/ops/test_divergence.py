"""The divergence of drafts from a model, against float64 without chunks."""

import pytest
import torch

from benthic.ops.divergence import linear_divergence, linear_divergence_reference


def states(rows, width, words, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (rows, width), (words, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "width", "words"), [(1, 3, 2), (511, 7, 33), (512, 16, 5), (1300, 5, 41)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)]
)
def test_value_and_gradient_are_those_of_the_reference(rows, width, words, dtype, tolerance, seed):
    student, teacher, weight = states(rows, width, words, dtype, seed)
    exact = [x.double() for x in (student, teacher, weight)]
    exact[0].requires_grad_()
    expected = linear_divergence_reference(*exact)
    (3 * expected).backward()
    for x in (student, teacher, weight):
        x.requires_grad_()
    found = linear_divergence(student, teacher, weight)
    (3 * found).backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    scale = exact[0].grad.abs().max()
    torch.testing.assert_close(student.grad.double() / scale, exact[0].grad / scale, rtol=0, atol=tolerance)
    assert teacher.grad is None
    assert weight.grad is None


def test_it_is_what_torch_calls_the_kullback_leibler_divergence():
    student, teacher, weight = states(40, 6, 9, torch.float64, 5)
    logits = [(x @ weight.T).log_softmax(-1) for x in (student, teacher)]
    expected = torch.nn.functional.kl_div(*logits, log_target=True, reduction="batchmean")
    torch.testing.assert_close(linear_divergence(student, teacher, weight), expected)


def test_equal_states_are_no_distance_apart_and_nothing_is_none():
    student, _, weight = states(20, 6, 9, torch.float32, 1)
    student.requires_grad_()
    found = linear_divergence(student, student.detach(), weight)
    found.backward()
    assert abs(found.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6
    nothing = linear_divergence(student[:0], student[:0], weight)
    nothing.backward()
    assert nothing.item() == 0.0
