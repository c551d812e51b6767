import torch

from evals.head import Head


class Model(torch.nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.lm_head_weight = weight


def test_bfloat16_weights_and_states_give_unrounded_logits():
    torch.manual_seed(0)
    weight, hidden = torch.randn(300, 64).bfloat16(), (4 * torch.randn(9, 64)).bfloat16()
    exact = hidden.double() @ weight.double().T
    found = Head(Model(weight))(hidden)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4  # a bfloat16 result is off by up to 0.25 here
    assert ((hidden @ weight.T).double() - exact).abs().max() > 0.01


def test_float32_states_keep_full_products_and_the_global_setting_is_put_back():
    torch.manual_seed(0)
    weight, hidden = torch.randn(300, 64).bfloat16(), torch.randn(9, 64)
    before = torch.get_float32_matmul_precision()
    found = Head(Model(weight))(hidden)
    assert (found - hidden.double() @ weight.double().T).abs().max() < 1e-4
    assert torch.get_float32_matmul_precision() == before
