"""PyTorch's test cases for optimizers, `torch.testing._internal.common_optimizers`, on every rule.

torch includes these cases but not the tests that use them. The tests here follow those in PyTorch's
test/test_optim.py.
"""

# ruff: noqa: B023 -- closures are called within their iteration
from __future__ import annotations

import copy
import functools
import tempfile
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

pytest.importorskip("expecttest")
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from learned_opt.weights import load_rule


class Shipped(LearnedOptimizer):
    """The rule and the weights that a user gets."""


def descending_lstm() -> UpdateRule:
    """L2L's rule as sign descent, for with random weights it goes anywhere."""
    rule = make_rule("coordinatewise_lstm", hidden=1, layers=1)
    with torch.no_grad():
        rule.cells[0].weight.zero_()
        rule.cells[0].weight[2, 1] = 1.0  # the cell's input is the sign; all gates are half open
        rule.head.weight.fill_(-1.0)
        rule.head.bias.zero_()
    return rule


class Published(LearnedOptimizer):
    __init__ = functools.partialmethod(LearnedOptimizer.__init__, weights=descending_lstm())


def descending_rnnprop() -> UpdateRule:
    """RNNProp's rule with weights that go down, as `descending_lstm`."""
    rule = make_rule("rnnprop", hidden=1, layers=1, alpha=0.01)
    with torch.no_grad():
        rule.inlet.weight.copy_(torch.tensor([[0.0, 1.0]]))  # m̂/√v̂
        rule.cells[0].weight.zero_()
        rule.cells[0].weight[2, 0] = 1.0
        for layer in (rule.inlet, rule.head):
            layer.bias.zero_()
        rule.head.weight.fill_(1.0)
    return rule


class Prop(LearnedOptimizer):
    __init__ = functools.partialmethod(LearnedOptimizer.__init__, weights=descending_rnnprop())


def scheduled() -> UpdateRule:
    """The shipped rule with a scheduler that does something."""
    shipped, rng = load_rule(), torch.Generator().manual_seed(0)
    rule = make_rule("scheduled", base=shipped.name, base_config=shipped.config, hidden=4)
    rule.base.load_state_dict(shipped.state_dict())
    with torch.no_grad():
        rule.head.weight.copy_(0.3 * torch.randn(1, 4, generator=rng))
    return rule


class Scheduled(LearnedOptimizer):
    __init__ = functools.partialmethod(LearnedOptimizer.__init__, weights=scheduled())


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    settings = {
        "default": {},
        "non-default lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.5)},
        "non-zero weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
    }
    return [OptimizerInput(params=None, kwargs=k, desc=d) for d, k in settings.items()]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    found = get_error_inputs_for_all_optims(device, dtype)
    for name in ("lr", "weight_decay"):
        bad = OptimizerInput(params=None, kwargs={name: -0.5}, desc=f"negative {name}")
        found.append(ErrorOptimizerInput(bad, error_type=ValueError, error_regex=f"{name} is -0.5"))
    return found


ALL = [
    OptimizerInfo(
        optimizer, optim_inputs_func=inputs, optim_error_inputs_func=error_inputs,
        supported_impls=(), supports_complex=False,
        not_og_supported_flags=("maximize", "num_steps"),
    )
    for optimizer in (Shipped, Published, Prop, Scheduled)
]  # fmt: skip
# L2L's and RNNProp's move a parameter without gradient, see their docstrings.
GATED = [info for info in ALL if info.optim_cls not in (Published, Prop)]


def make(info: OptimizerInfo, setting: OptimizerInput, params: object) -> LearnedOptimizer:
    return info.optim_cls(params, **copy.deepcopy(setting.kwargs))


def weight_and_bias(device: str, contiguous: bool = True) -> tuple[Parameter, Parameter, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, b, x = (torch.randn(s, generator=generator).to(device) for s in ((10, 5, 2), (10, 2), (5,)))
    if contiguous:
        return Parameter(w[..., 0].clone()), Parameter(b[..., 0].clone()), x
    return Parameter(w[..., 0]), Parameter(b[..., 0]), x


def closure_of(optimizer: LearnedOptimizer, weight: Tensor, bias: Tensor, x: Tensor):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return closure


class TestOptim(TestCase):
    @optims(ALL)
    def test_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        flags = ("foreach", "fused", "differentiable")
        for setting in inputs(device):
            self.assertFalse(any(f in setting.kwargs for f in flags))

    @optims([info for info in ALL if info.optim_error_inputs_func])
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            self.assertEqual(error.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            if issubclass(error.error_type, Warning):
                with self.assertWarnsRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(given.params, **given.kwargs)
            else:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    optim_info.optim_cls(given.params, **given.kwargs)

    def _goes_the_right_direction(self, optimizer, closure, schedule):
        schedulers = [constructor(optimizer) for constructor in schedule]
        start = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(loss) if plateau else scheduler.step()
        climbs = optimizer.param_groups[0]["maximize"]
        (self.assertGreater if climbs else self.assertLess)(closure().item(), start)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(ALL)
    def test_goes_the_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        schedules = optim_info.scheduler_inputs if with_lrsched else [[]]
        for setting in optim_info.optim_inputs_func(device):
            for schedule in schedules:
                weight, bias, x = weight_and_bias(device, contiguous)
                optimizer = make(optim_info, setting, [weight, bias])
                closure = closure_of(optimizer, weight, bias, x)
                self._goes_the_right_direction(optimizer, closure, schedule)

    @parametrize("with_lrsched", [True, False])
    @optims([info for info in ALL if info.supports_param_groups])
    def test_param_groups_go_the_right_direction(self, device, dtype, optim_info, with_lrsched):
        schedules = optim_info.scheduler_inputs if with_lrsched else [[]]
        for setting in optim_info.optim_inputs_func(device):
            for schedule in schedules:
                weight, bias, x = weight_and_bias(device)
                still, still_bias, _ = weight_and_bias(device)
                groups = [
                    {"params": [weight]}, {"params": [bias], "lr": 0.3},
                    {"params": [still, still_bias], "lr": 1e-28},
                ]  # fmt: skip
                before = copy.deepcopy((still, still_bias))
                optimizer = make(optim_info, setting, groups)

                def closure():
                    optimizer.zero_grad()
                    for w, b in ((weight, bias), (still, still_bias)):
                        loss = (w.mv(x) + b).square().sum()
                        loss.backward()
                    return (weight.mv(x) + bias).square().sum()

                self._goes_the_right_direction(optimizer, closure, schedule)
                self.assertEqual((still, still_bias), before, rtol=0, atol=0)

    @parametrize("numel", [0, 1])
    @optims(ALL)
    def test_tensor_lr(self, device, dtype, optim_info, numel):
        """0: a scalar; 1: of shape (1,)."""
        lr = torch.tensor(0.5) if numel == 0 else torch.tensor([0.5])
        weight, bias, x = weight_and_bias(device)
        weight_c, bias_c = copy.deepcopy((weight, bias))
        optimizer = optim_info.optim_cls([weight, bias], lr=0.5)
        optimizer_c = optim_info.optim_cls([weight_c, bias_c], lr=lr)
        for _ in range(5):
            optimizer.step(closure_of(optimizer, weight, bias, x))
            optimizer_c.step(closure_of(optimizer_c, weight_c, bias_c, x))
            self.assertEqual((weight, bias), (weight_c, bias_c))

    @optims(ALL)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            param = torch.randn(3, 3, device=device, requires_grad=False)
            before = param.clone()
            optimizer = make(optim_info, setting, [param])
            optimizer.step()
            self.assertEqual(param, before, rtol=0, atol=0)

    @optims(GATED)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            param = torch.randn(3, 3, device=device, requires_grad=True)
            before = param.detach().clone()
            optimizer = make(optim_info, setting, [param])
            for _ in range(3):
                param.grad = torch.zeros_like(param)
                optimizer.step()
            self.assertEqual(param.detach(), before, rtol=0, atol=0)

    @optims(ALL)
    def test_can_be_printed(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            optimizer = make(optim_info, setting, [torch.randn(2, 3, requires_grad=True)])
            self.assertIn("weight_decay", repr(optimizer))

    def _primed(self, optim_info, setting, device, named=False):
        weight, bias, x = weight_and_bias(device)
        params = [("weight", weight), ("bias", bias)] if named else [weight, bias]
        optimizer = make(optim_info, setting, params)
        closure = closure_of(optimizer, weight, bias, x)
        for _ in range(3):
            optimizer.step(closure)
        return optimizer, weight, bias, x

    def _goes_on_alike(self, optim_info, setting, primed, state_dict, named=False):
        optimizer, weight, bias, x = primed
        weight_c, bias_c = copy.deepcopy((weight, bias))
        params = [("weight", weight_c), ("bias", bias_c)] if named else [weight_c, bias_c]
        optimizer_c = make(optim_info, setting, params)
        optimizer_c.load_state_dict(state_dict)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, weight, bias, x))
            optimizer_c.step(closure_of(optimizer_c, weight_c, bias_c, x))
            self.assertEqual((weight, bias), (weight_c, bias_c), rtol=0, atol=0)
        return optimizer_c

    @parametrize("is_named", [True, False])
    @optims(ALL)
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named):
        for setting in optim_info.optim_inputs_func(device):
            primed = self._primed(optim_info, setting, device, is_named)
            saved = copy.deepcopy(primed[0].state_dict())
            given = copy.deepcopy(saved)
            loaded = self._goes_on_alike(optim_info, setting, primed, given, is_named)
            self.assertEqual(given, saved)
            self.assertEqual(primed[0].state_dict(), loaded.state_dict())
            names = loaded.state_dict()["param_groups"][0].get("param_names")
            self.assertEqual(names, ["weight", "bias"] if is_named else None)

    @optims(ALL)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            if setting.kwargs.get("maximize"):
                continue
            primed = self._primed(optim_info, setting, device)
            older = copy.deepcopy(primed[0].state_dict())
            for group in older["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            for entries in older["state"].values():
                del entries["skipped"], entries["clock"]
            self._goes_on_alike(optim_info, setting, primed, older)

    @parametrize("is_named_saver", [True, False])
    @parametrize("is_named_loader", [True, False])
    @optims(ALL)
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, is_named_saver, is_named_loader
    ):
        for setting in optim_info.optim_inputs_func(device):
            primed = self._primed(optim_info, setting, device, is_named_saver)
            saved = primed[0].state_dict()
            loaded = self._goes_on_alike(optim_info, setting, primed, saved, is_named_loader)
            named = "param_names" in loaded.state_dict()["param_groups"][0]
            self.assertEqual(named, is_named_saver or is_named_loader)

    @parametrize("is_named", [True, False])
    @optims(ALL)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named):
        for setting in optim_info.optim_inputs_func(device):
            primed = self._primed(optim_info, setting, device, is_named)
            saved = primed[0].state_dict()
            with tempfile.TemporaryFile() as file:
                torch.save(saved, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=True)
            self.assertEqual(loaded, saved)
            self._goes_on_alike(optim_info, setting, primed, loaded, is_named)

    @optims(ALL)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            primed = self._primed(optim_info, setting, device)
            saved = copy.deepcopy(primed[0].state_dict())
            for entries in saved["state"].values():
                entries["step"] = entries["step"].item()
            self._goes_on_alike(optim_info, setting, primed, saved)

    @optims(ALL, dtypes=[torch.float16, torch.bfloat16, torch.float64])
    def test_state_is_float32_of_any_parameters(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            param = torch.randn(4, 3, device=device).to(dtype).requires_grad_()
            optimizer = make(optim_info, setting, [param])
            for _ in range(2):
                param.grad = torch.randn_like(param)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            param.grad = torch.randn_like(param)
            optimizer.step()
            self.assertTrue(all(v.dtype == torch.float32 for v in optimizer.state[param].values()))
            self.assertTrue(param.isfinite().all())

    @optims(ALL)
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        if not torch.cuda.is_available():
            self.skipTest("needs a GPU")
        for setting in optim_info.optim_inputs_func(device):
            optimizer, weight, bias, x = self._primed(optim_info, setting, "cpu")
            weight_c, bias_c = (Parameter(p.detach().cuda()) for p in (weight, bias))
            optimizer_c = make(optim_info, setting, [weight_c, bias_c])
            optimizer_c.load_state_dict(optimizer.state_dict())
            for _ in range(3):
                optimizer.step(closure_of(optimizer, weight, bias, x))
                optimizer_c.step(closure_of(optimizer_c, weight_c, bias_c, x.cuda()))
                self.assertEqual((weight, bias), (weight_c.cpu(), bias_c.cpu()))

    @optims(ALL)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            optimizer, *_ = self._primed(optim_info, setting, device)
            public = [{k for k in o.__dict__ if not k.startswith("_")}
                      for o in (optimizer, copy.deepcopy(optimizer))]  # fmt: skip
            self.assertEqual(*public)

    @optims(ALL)
    def test_hooks_run_in_order(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            optimizer, weight, bias, x = self._primed(optim_info, setting, device)
            seen = []
            note = {
                "pre": optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
                "post": optimizer.register_step_post_hook(lambda *_: seen.append("post")),
            }

            def closure():
                seen.append("closure")
                return closure_of(optimizer, weight, bias, x)()

            optimizer.step(closure)
            self.assertEqual(seen, ["pre", "closure", "post"])
            for handle in note.values():
                handle.remove()
            optimizer.step(closure)
            self.assertEqual(seen, ["pre", "closure", "post", "closure"])

    @optims(ALL)
    def test_state_dict_hooks(self, device, dtype, optim_info):
        """A hook before loading may change what is loaded; one after it sees the result."""
        for setting in optim_info.optim_inputs_func(device):
            optimizer, weight, bias, _ = self._primed(optim_info, setting, device)
            saved = optimizer.state_dict()

            def later(optimizer, state_dict):
                state = copy.deepcopy(state_dict["state"])
                for entries in state.values():
                    entries["step"] += 4
                return state_dict | {"state": state}

            steps = []
            optimizer.register_load_state_dict_pre_hook(later)
            optimizer.register_load_state_dict_post_hook(
                lambda o: steps.extend(o.state[p]["step"].item() for p in (weight, bias))
            )
            optimizer.register_state_dict_post_hook(lambda o, d: d | {"note": 1})
            optimizer.load_state_dict(saved)
            self.assertEqual(steps, [7.0, 7.0])
            self.assertEqual(optimizer.state_dict()["note"], 1)

    @optims(ALL)
    def test_no_warnings(self, device, dtype, optim_info):
        for setting in optim_info.optim_inputs_func(device):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self._primed(optim_info, setting, device)


instantiate_device_type_tests(TestOptim, globals(), only_for=("cpu", "cuda"))
