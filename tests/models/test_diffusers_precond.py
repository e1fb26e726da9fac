"""Denoisers of diffusers: the mapping to D(x; σ) beside the package's own schedulers, folders, students, exports."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers_folders import UNET, package, randomised, relative, write_unet
from safetensors.torch import load_file, save_file
from tiny import SAMPLE, TRAIN, Patches, flags, invoke, only_run, png_names, write_images, write_teacher

from dnnlib import UserError
from models.diffusers_precond import DiffusersPrecond
from models.export.folder import state_scale
from models.export.student import open_student
from models.loading import guidance_of, load_student, load_teacher
from models.noise import DiscreteNoise, FlowNoise, TableNoise, alpha_table, betas
from models.paths import find_model
from models.published.diffusers_folder import TABLES, open_folder, read_noise
from solvers import get_solver, solve
from torch_utils.checkpoint import read_network, save_network
from training.config import DistillConfig
from training.cost import run_cost
from training.memory import run_memory

TABLE = dict(
    prediction_type="epsilon", num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
    trained_betas=None, rescale_betas_zero_snr=False,
)  # fmt: skip
#: Four short iterations.
SHORT = dict(total_kimg=0.016, batch=4, M=0, tick=0.016, lr=1e-2)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- Noise levels ----------------------------------------------------------------------------------------------------


def test_betas_of_every_name():
    for name in ("linear", "scaled_linear", "sigmoid"):
        values = betas(name, 1e-4, 0.02, 1000)
        assert (values.diff() > 0).all() and len(values) == 1000
    assert float(betas("linear", 0.1, 0.3, 3)[1]) == pytest.approx(0.2)
    assert float(betas("scaled_linear", 0.01, 0.09, 3)[1]) == pytest.approx(0.04)  # the mean of the roots is 0.2
    assert float(betas("sigmoid", 0.0, 1.0, 3)[1]) == pytest.approx(0.5)
    cosine = alpha_table(betas("squaredcos_cap_v2", 0, 0, 1000))
    times = (torch.arange(1, 1000, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(cosine[:-1], times.cos().square() / start, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="beta_schedule 'quadratic'"):
        betas("quadratic", 0, 1, 10)


def test_a_table_without_signal_at_its_end_is_cut():
    plain, stretched = (alpha_table(betas("linear", 1e-4, 0.02, 1000), zero_snr) for zero_snr in (False, True))
    assert len(plain) == 1000 and len(stretched) == 999
    assert float(stretched[0]) == pytest.approx(float(plain[0])) and (stretched[1:] < plain[1:999]).all()
    noise = TableNoise(stretched)
    sigmas = torch.tensor([80.0, 1.0, 0.02], dtype=torch.float64)
    torch.testing.assert_close(noise.sigma(noise.sigma_inv(sigmas)), sigmas, rtol=1e-9, atol=0)
    assert float(noise.step(torch.tensor([noise.sigma_max]))) == pytest.approx(998, abs=1e-2)


def test_a_table_is_that_of_stable_diffusion():
    own = DiscreteNoise(0.00085, 0.012, 1000)
    assert torch.equal(own.alphas_cumprod, alpha_table(betas("scaled_linear", 0.00085, 0.012, 1000)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_time_of_a_flow(shift):
    noise, even = FlowNoise(shift, 1000), torch.tensor([0.999, 0.5, 0.01], dtype=torch.float64)
    moved = shift * even / (1 + (shift - 1) * even)
    torch.testing.assert_close(noise.sigma(even), moved / (1 - moved), rtol=1e-9, atol=0)
    torch.testing.assert_close(noise.sigma_inv(noise.sigma(even)), even, rtol=1e-9, atol=0)
    torch.testing.assert_close(noise.step(noise.sigma(even)).double(), 1000 * moved, rtol=1e-6, atol=0)


# --- The mapping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_steps_are_those_of_ddim(prediction, schedule, zero_snr):
    changes = dict(prediction_type=prediction, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    scheduler = package().DDIMScheduler(clip_sample=False, timestep_spacing="leading", **changes)
    scheduler.set_timesteps(5)
    net = DiffusersPrecond("UNet2DModel", UNET, {**TABLE, **changes}).eval()
    randomised(net.model.net)
    levels = net.noise_schedule.alphas_cumprod
    assert relative(levels.float(), scheduler.alphas_cumprod[: len(levels)]) < 1e-5
    sigmas = ((1 - levels) / levels).sqrt()[scheduler.timesteps]
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = noise
    with torch.no_grad():
        for t in scheduler.timesteps[:-1]:
            expected = scheduler.step(net.model.net(expected, t).sample, t, expected).prev_sample
        found = solve(get_solver("euler"), net, noise * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)[-1]
    # A first level of nearly no signal makes much of rounding, and processors round otherwise (3.3e-5 on one of them).
    assert relative(found / (1 + float(sigmas[-1]) ** 2) ** 0.5, expected) < 1e-4


def test_half_precision_stays_in_the_core():
    package()
    net = DiffusersPrecond("UNet2DModel", UNET, TABLE).eval().requires_grad_(False)
    randomised(net.model.net)
    x = torch.randn(2, 3, 8, 8) * 5
    exact = net(x, 5.0)
    net.compute_dtype = torch.bfloat16
    found = net(x, 5.0)
    assert found.dtype == torch.float32 and 0 < relative(found, exact) < 0.05


def test_a_step_condition_starts_at_nothing_and_copies_have_their_own():
    package()
    net = DiffusersPrecond("UNet2DModel", UNET, TABLE, use_step_condition=True).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x, 2.0, step_condition=4.0), net(x, 2.0))
    other = copy.deepcopy(net)
    randomised(other.model.step_condition)
    four, six = (other(x, 2.0, step_condition=steps) for steps in (4.0, 6.0))
    assert not torch.equal(four, six) and torch.equal(other(x, 2.0), net(x, 2.0, step_condition=4.0))
    rows = other(x, 2.0, step_condition=torch.tensor([4.0, 6.0]))
    torch.testing.assert_close(rows, torch.stack([four[0], six[1]]))


def test_classes_without_one_for_none():
    package()
    net = DiffusersPrecond("UNet2DModel", {**UNET, "num_class_embeds": 3}, TABLE).eval().requires_grad_(False)
    randomised(net.model.net)
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(3)[[2, 0]]
    times = net.noise_schedule.step(torch.tensor([2.0, 2.0]))
    expected = x - 2 * net.model.net(x / 5**0.5, times, class_labels=torch.tensor([2, 0])).sample
    torch.testing.assert_close(net(x, 2.0, labels), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no class for none"):
        net(x, 2.0)


def test_checkpointed_gradients_are_the_same():
    package()
    torch.manual_seed(0)
    net = DiffusersPrecond("UNet2DModel", UNET, TABLE, use_step_condition=True)
    randomised(net)
    x, found = torch.randn(2, 3, 8, 8), []
    for checkpointed in (False, True):
        if checkpointed:
            net.checkpoint_gradients()
        net.train().zero_grad()
        net(x, 2.0, step_condition=5.0).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for plain, again in zip(*found):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(beta_schedule="scaled_linear"), None),
        (dict(), "the noise levels go on to sigma 157.4; sampling starts at sigma 80"),
        (
            dict(rescale_betas_zero_snr=True),
            "the last noise level has no signal and is cut .*; sampling starts at sigma 80",
        ),
    ],
)
def test_what_is_cut_of_the_noise_levels_is_said(changes, words):
    package()
    remark = DiffusersPrecond("UNet2DModel", UNET, {**TABLE, **changes}).remark
    assert remark is None if words is None else re.match(words, remark)


SDXL_BLOCKS = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
PUBLISHED = {
    "ddpm-cifar10-32": ("UNet2DModel", 35_746_307, dict(
        UNET, sample_size=32, layers_per_block=2, block_out_channels=[128, 256, 256, 256], norm_num_groups=32,
        attention_head_dim=None, down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])),
    "stable-diffusion-2-1": ("UNet2DConditionModel", 865_910_724, dict(
        sample_size=96, in_channels=4, out_channels=4, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
        block_out_channels=[320, 640, 1280, 1280], use_linear_projection=True)),
    "stable-diffusion-xl": ("UNet2DConditionModel", 2_567_463_684, dict(
        sample_size=128, in_channels=4, out_channels=4, attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
        block_out_channels=[320, 640, 1280], down_block_types=SDXL_BLOCKS, transformer_layers_per_block=[1, 2, 10],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)),
    # 675 million, and a copy of the embedding of times and labels in all blocks but one.
    "DiT-XL-2-256": ("DiTTransformer2DModel", 749_826_464, dict(
        sample_size=32, in_channels=4, out_channels=8, num_layers=28, num_attention_heads=16, attention_head_dim=72,
        num_embeds_ada_norm=1000)),
    "stable-diffusion-3-medium": ("SD3Transformer2DModel", 2_028_328_000, dict(
        sample_size=128, in_channels=16, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=192)),
}  # fmt: skip
FULL = [
    pytest.param(name, marks=pytest.mark.slow) if "-3" in name and "diffusion" in name else name for name in PUBLISHED
]


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_take_no_memory_to_describe(name):
    package()
    module, count, config = PUBLISHED[name]
    noise = {**TABLE, "prediction_type": "flow", "shift": 3.0} if module.startswith("SD3") else TABLE
    config = {"joint_attention_dim": 4096, **config} if module.startswith("SD3") else config
    with torch.device("meta"):
        net = DiffusersPrecond(module, config, noise, use_step_condition=True)
    parameters = list(net.model.net.parameters())
    assert sum(p.numel() for p in parameters) == count and all(p.is_meta for p in parameters)
    assert len(net.model.step_condition.vectors) == (28 if module.startswith("DiT") else 1)


# --- From a folder to a student --------------------------------------------------------------------------------------


def test_folders_are_read_without_change():
    folder = write_unet(Path("ddpm"), dict(beta_schedule="squaredcos_cap_v2"))
    teacher = load_teacher(None, folder)
    state = package().UNet2DModel.from_pretrained(folder / "unet").state_dict()
    assert {name.removeprefix("model.net."): t for name, t in teacher.net.state_dict().items()}.keys() == state.keys()
    assert all(torch.equal(teacher.net.state_dict()[f"model.net.{name}"], t) for name, t in state.items())
    assert (teacher.dataset_name, teacher.shape) == ("ddpm", (3, 8, 8))
    assert (teacher.sigma_min, teacher.sigma_max) == (0.01, 80.0)


def test_flat_folders_old_names_and_shards():
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    expected = load_teacher(None, write_unet(Path("ddpm"))).net.state_dict()
    flat = write_unet(Path("flat"), flat=True)
    weights = flat / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)
    sharded = write_unet(Path("sharded"))
    unet = package().UNet2DModel.from_pretrained(sharded / "unet")
    (sharded / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(sharded / "unet", max_shard_size="50KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    for folder in (flat, sharded):
        found = load_teacher(None, folder).net.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def train(folder: Path, **changes) -> Path:
    """The run directory of a student."""
    invoke("train", *flags(TRAIN, SHORT, dict(model_path=folder, outdir="runs"), changes)).ok()
    return only_run(Path("runs"))


def our_states(student, noise, cond=None):
    """States of our sampler, from the first that evaluates the network on."""
    sampler, plan = student.sampler, student.sampler.plan
    with torch.no_grad():
        denoise = student.model.denoiser(cond, plan.guidance_rate, sampler.step_condition)
        states = solve(plan.solver, denoise, noise * student.model.sigma_max, sampler.sigmas, plan.afs)
    return states[int(plan.afs) :]


def their_states(pipe, **arguments):
    """States of a pipeline, and its images."""
    states, step = [], pipe.scheduler.__class__.step
    pipe.set_progress_bar_config(disable=True)

    def recorded(self, output, t, sample, **kwargs):
        if not states:
            states.append(sample)
        result = step(self, output, t, sample, **{**kwargs, "return_dict": True})
        states.append(result.prev_sample)
        return result if kwargs.get("return_dict", True) else (result.prev_sample,)

    pipe.scheduler.__class__.step = recorded
    try:
        images = pipe(**arguments, output_type="pt").images
    finally:
        pipe.scheduler.__class__.step = step
    return torch.stack(states), images


@pytest.mark.parametrize("variable, afs", [(False, True), (True, True), (False, False)], ids=["sfd", "sfd-v", "no afs"])
def test_from_a_folder_to_images_and_back(variable, afs):
    """train.py, sample.py, fid.py and export of a UNet2DModel, and the stock pipeline beside our sampler."""
    folder = write_unet(Path("ddpm"))
    run_dir = train(folder, use_step_condition=variable, afs=afs)
    folder.rename("elsewhere")  # a student of pixels needs nothing of it
    invoke("sample", *flags(SAMPLE, dict(model_path=run_dir, seeds="0-1", outdir="out"))).ok()
    assert png_names(Path("out")) == ["000000.png", "000001.png"]
    invoke("models.export", "diffusers", *flags(dict(model_path=run_dir, dest="exported"))).ok()
    student = open_student(str(run_dir))
    pipe = package().DDIMPipeline.from_pretrained("exported")
    count, seed = len(student.steps) - 1, torch.Generator().manual_seed
    states, images = their_states(pipe, batch_size=3, generator=seed(5), num_inference_steps=count)
    ours = our_states(student, torch.randn(3, 3, 8, 8, generator=seed(5)))
    scale = state_scale(student) / (1 + student.steps.float() ** 2).sqrt()
    assert relative(states, ours * scale[:, None, None, None, None]) < 5e-6
    expected = (ours[-1] / 2 + 0.5).clamp(0, 1)
    assert (images - expected).abs().max() < abs(float(scale[-1]) - 1) + 1e-5 < (0.004 if afs else 1e-3)
    invoke("train", *flags(TRAIN, dict(model_path="exported"))).refused("exported from a student")
    if not afs:
        invoke("models.export", "program", *flags(dict(model_path=run_dir, dest="step.pt2"))).ok()


def test_teachers_are_sampled_and_measured():
    folder = write_unet(Path("ddpm"))
    many = dict(model_path=folder, seeds="0-7", num_steps=3, solver="euler")
    invoke("sample", *flags(SAMPLE, many, outdir="out")).ok()
    measured = invoke("sample", *flags(SAMPLE, many, outdir="again"), "--dry-run").ok()
    assert '"nfe": 2' in measured.output
    plan = invoke("train", *flags(TRAIN, dict(model_path=folder, use_step_condition=True)), "--dry-run").ok()
    assert "NFE 2to5" in plan.output
    config, net = DistillConfig("ddpm", model_path=str(folder), precision="fp16"), load_teacher(None, folder).net
    assert run_cost(config, net).flops > 1e5 and run_memory(config, net, 4).total > 1e5
    torch.jit.script(Patches()).save("patches.pt")
    write_images(Path("real"), 8)
    gen = dict(many, ref="real", detector="patches.pt", device="cpu", precision="fp32")
    invoke("fid", "gen", *flags(gen), "--detector-runs-code").ok()
    assert json.loads(Path("metrics.jsonl").read_text())["N"] == 8
    assert invoke("sample", *flags(SAMPLE, many, guidance_rate=2)).refused("guidance_rate")


def test_how_a_teacher_is_guided_is_known_without_its_weights():
    folder = write_unet(Path("ddpm"))
    Path("mine").mkdir()
    write_teacher(Path("mine/teacher.safetensors"))
    for path in (folder, "mine", "mine/teacher.safetensors", "nothing", None):
        assert guidance_of("own", path) == (False, 1.0)
    assert guidance_of("ms_coco", folder) == guidance_of("ms_coco") == (True, 7.5)


def test_classes_without_one_for_none_are_not_guided():
    folder = write_unet(Path("classes"), num_class_embeds=3)
    for script, more in (("train", TRAIN), ("sample", dict(SAMPLE, num_steps=3))):
        invoke(script, *flags(more, dict(model_path=folder, guidance_rate=2))).refused("no class for none")
    invoke(
        "sample", *flags(SAMPLE, dict(model_path=folder, num_steps=3, solver="euler", seeds="0-1", outdir="out"))
    ).ok()
    assert png_names(Path("out")) == ["000000.png", "000001.png"]


# --- Bad input -------------------------------------------------------------------------------------------------------


def _change(file: str, **changes):
    def damage(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _to_pickle(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def _one_shard(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(weights.with_name("one.safetensors"))


def _change_weights(change):
    def damage(folder):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        save_file(change(load_file(weights)), weights)

    return damage


def _first(change):
    return _change_weights(lambda tensors: {**tensors, "conv_in.bias": change(tensors["conv_in.bias"])})


def _other_variant(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))


def _outside(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


UNET_FILE, SCHEDULER_FILE = "unet/config.json", "scheduler/scheduler_config.json"
DAMAGES = [
    (_change(UNET_FILE, _class_name="os.system"), "of class 'os.system'; expected UNet2DModel"),
    (_change(UNET_FILE, _class_name=["UNet2DModel"]), "of class"),
    (_change(UNET_FILE, time_embedding_type="fourier"), "time_embedding_type 'fourier'; expected positional"),
    (_change(UNET_FILE, sample_size=[8, 16]), "sample_size"),
    (_change(UNET_FILE, layers_per_block=10**9), "layers_per_block 1000000000, which is out of range"),
    (_change(UNET_FILE, block_out_channels=[16] * 99), "99 entries"),
    (_change(UNET_FILE, patch_size="two"), "sizes that are no numbers"),
    (_change(UNET_FILE, block_out_channels=[16, 64]), "does not fit the network"),
    (_change(UNET_FILE, down_block_types=["DownBlock2D", "Nothing"]), "cannot be built"),
    (_change(SCHEDULER_FILE, _class_name="MyScheduler"), "of class 'MyScheduler'; expected one of DDPMScheduler"),
    (_change(SCHEDULER_FILE, _class_name="FlowMatchEulerDiscreteScheduler"), "does not belong to a UNet2DModel"),
    (_change(SCHEDULER_FILE, prediction_type="score"), "prediction_type 'score'; expected epsilon"),
    (_change(SCHEDULER_FILE, beta_schedule="cubic"), "beta_schedule 'cubic'"),
    (_change(SCHEDULER_FILE, beta_end=7), "no usable noise schedule"),
    (_change(SCHEDULER_FILE, trained_betas=[0.1, 0.2]), "trained_betas"),
    (_change(SCHEDULER_FILE, num_train_timesteps="many"), "num_train_timesteps many"),
    (_change(SCHEDULER_FILE, rescale_betas_zero_snr="yes"), "rescale_betas_zero_snr 'yes'; expected true or false"),
    (_change(SCHEDULER_FILE, _class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "says use_flow_sigmas"),
    (_first(lambda bias: bias.to(torch.int8)), "holds conv_in.bias as torch.int8; expected floating point"),
    (_first(lambda bias: bias * float("nan")), "numbers in conv_in.bias that are not finite"),
    (_change_weights(lambda tensors: {**tensors, "more": torch.ones(2)}), "1 differences, first unexpected more"),
    (_change_weights(lambda tensors: {"more": torch.ones(2)}), "first missing conv_in.weight"),
    (_other_variant, "but diffusion_pytorch_model.non_ema.safetensors, another variant"),
    (lambda f: (f / SCHEDULER_FILE).unlink(), "holds no scheduler/scheduler_config.json"),
    (lambda f: (f / SCHEDULER_FILE).write_text("[" * 9999), "not a JSON object"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"{}"), "cannot be read"),
    (_to_pickle, "diffusion_pytorch_model.bin, a pickle, .* save_pretrained"),
    (_one_shard, "lacks two.safetensors, one of 2 files"),
    (_outside, "does not list files of weights"),
]  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_other_folders_are_refused(damage, message):
    folder = write_unet(Path("ddpm"))
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_teacher(None, folder)
    assert "\n" not in error.value.message


def test_a_network_without_its_pipeline_is_refused():
    part = write_unet(Path("ddpm")) / "unet"
    with pytest.raises(UserError, match="expected the folder of a whole pipeline"):
        load_teacher(None, part)


def test_a_name_of_the_hub_is_not_fetched():
    refused = invoke("train", *flags(TRAIN, dict(model_path="google/ddpm-cifar10-32")))
    refused.refused("nothing is fetched by a name of the Hub: hf download google/ddpm-cifar10-32 --local-dir")


def test_the_cache_of_the_hub(tmp_path):
    """Symbolic links to blobs, below the hash of a commit; the network is called as the model is."""
    folder, cache = write_unet(Path("ddpm")), tmp_path / "models--someone--tiny"
    (cache / "blobs").mkdir(parents=True)
    for i, file in enumerate(file for file in folder.rglob("*") if file.is_file()):
        blob, link = cache / "blobs" / str(i), cache / "snapshots" / "0a1b2c" / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(Path("../" * (len(link.relative_to(cache).parts) - 1)) / "blobs" / str(i))
    for path in (cache, cache / "snapshots" / "0a1b2c"):
        assert find_model(path) == cache / "snapshots" / "0a1b2c"
        teacher = load_teacher(None, path)
        assert teacher.dataset_name == "models--someone--tiny" and teacher.sigma_max == 80
    assert train(cache).name.startswith("00000-models--someone--tiny-")


def test_half_precision_variants():
    expected = load_teacher(None, write_unet(Path("ddpm"))).net.state_dict()
    weights = Path("ddpm/unet/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    for variant, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(halves, weights.with_suffix(f".{variant}.safetensors"))
        found = load_teacher(None, "ddpm").net.state_dict()
        assert all(torch.equal(found[f"model.net.{name}"], half.float()) for name, half in halves.items())
        assert found.keys() == expected.keys()


def test_a_folder_guides_and_is_guided():
    """Autoguidance of one folder by another, through train.py; one of another size is refused."""
    strong, weak = write_unet(Path("strong")), write_unet(Path("weak"), block_out_channels=[8, 16])
    run_dir = train(strong, guide=weak, guidance_rate=2)
    assert run_dir.name.endswith("-w2") and load_student(run_dir).sampling.guide_path == str(weak.resolve())
    teacher = load_teacher(None, strong, guide_path=weak)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        free, bound = teacher.guide(x, 2.0), teacher.net(x, 2.0)
        torch.testing.assert_close(teacher.denoise(x, 2.0, guidance_rate=2.0), 2 * bound - free)
    large = write_unet(Path("large"), sample_size=16)
    invoke("train", *flags(TRAIN, dict(model_path=strong, guide=large, guidance_rate=2))).refused(
        r"--guide: \S*large cannot guide this teacher: it is a network of 3×16² pixels, 0 classes; expected 3×8² pixels"
    )


def test_a_name_of_another_size_is_refused():
    with pytest.raises(UserError, match="states of 8², cifar10 of 32²; leave it out"):
        load_teacher("cifar10", write_unet(Path("ddpm")))


def test_students_that_describe_nothing_are_refused():
    run_dir = train(write_unet(Path("ddpm")))
    path = max(run_dir.glob("*.safetensors"))
    tensors, settings = read_network(path)
    for change, message in (
        (dict(module="nn.Module"), "of class 'nn.Module'"),
        (dict(config={**UNET, "layers_per_block": 10**8}), "out of range"),
        (dict(config=7), "cannot be built"),
        (dict(noise={**TABLE, "prediction_type": "flow", "shift": 1.0}), "belong to different models"),
        (dict(noise=[]), "cannot be built"),
    ):
        save_network("bad.safetensors", tensors, {**settings, "network": {**settings["network"], **change}})
        with pytest.raises(UserError, match=message):
            load_student("bad.safetensors")


def test_the_package_is_asked_for_where_it_is_missing(monkeypatch):
    folder = write_unet(Path("ddpm"))
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        load_teacher(None, folder)


@pytest.mark.parametrize("name", TABLES)
def test_every_scheduler_that_the_package_saves_is_read(name):
    """Some of them have infinity among their defaults, which is no JSON."""
    folder = write_unet(Path("ddpm"))
    getattr(package(), name)(beta_end=0.03).save_pretrained((folder / SCHEDULER_FILE).parent)
    assert read_noise(open_folder(folder))["beta_end"] == 0.03


def test_a_schedule_that_is_not_finite_is_refused():
    folder = write_unet(Path("ddpm"))
    package()
    for changes in ({"beta_end": float("inf")}, {"beta_start": float("nan")}, {"trained_betas": [float("nan")] * 1000}):
        config = {"_class_name": "DDIMScheduler", **changes}
        (folder / SCHEDULER_FILE).write_text(json.dumps(config))
        with pytest.raises(UserError, match="no usable noise schedule"):
            load_teacher(None, folder)


def test_noise_of_a_scheduler_with_its_defaults():
    folder = write_unet(Path("ddpm"))
    (folder / SCHEDULER_FILE).write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "beta_end": 0.03}))
    package()
    assert read_noise(open_folder(folder)) == {**TABLE, "beta_end": 0.03}
