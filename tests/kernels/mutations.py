"""Deliberate faults in kernels, at least three for each, and the test that must see each of them.

`MUTATIONS[name]` are faults of ``fastvid_kernels/<name>.py``, seen by tests of ``test_<name>.py``. They change the text
that `ast.unparse` makes of the file: how a formatter lays it out, and its comments, are nothing to them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    old: str  # occurs once in that text
    new: str
    test: str  # function, or function[parameters]


MUTATIONS = {}
MUTATIONS["linear_cross_entropy"] = [
    Mutation("logits_ptr += row * row_stride", "logits_ptr += row * vocab_size", "test_equals_eager[dtype0-False-10]"),
    Mutation(
        "x = tl.where(tokens < vocab_size, x, float('-inf'))",
        "x = tl.where(tokens < row_stride, x, 0.0)",
        "test_equals_eager[dtype0-False-10]",
    ),
    Mutation(
        "total = total * tl.exp(top - higher) + tl.sum",
        "total = total + tl.sum",
        "test_rows_longer_than_a_tile[dtype0]",
    ),
    Mutation(
        "tl.where(tokens == target, p - 1, p)",
        "tl.where(tokens % BLOCK == target, p - 1, p)",
        "test_rows_longer_than_a_tile[dtype0]",
    ),
]
MUTATIONS["spatio_temporal_pool"] = [
    Mutation(
        "mask=(r < count)[:, None] & in_c",
        "mask=(r < T)[:, None] & in_c",
        "test_batch_reads_nothing_behind_the_real_frames[False-counts1-triton]",
    ),
    Mutation(
        "last = tl.minimum(first + run_frames, count)",
        "last = first + run_frames",
        "test_batch_reads_nothing_behind_the_real_frames[False-counts1-triton]",
    ),
    Mutation("p[:, None] * x_stride_p", "p[:, None] * x_stride_t", "test_strides[<lambda>0-triton]"),
    Mutation("    last = N\n", "    last = T\n", "test_strides[<lambda>0-triton]"),
    Mutation(
        "tl.where(start < count, K, 0)",
        "tl.where(start < count, 1, 0)",
        "test_larger_than_a_tile[3-300-130-dtype0-triton]",
    ),
    Mutation(
        "tl.where(start + BLOCK_R > N, S, 0)",
        "tl.where(start > N, S, 0)",
        "test_larger_than_a_tile[17-129-65-dtype0-triton]",
    ),
    Mutation(
        "tl.where(is_real, spatial + temporal[None, :], 0.0)",
        "spatial + temporal[None, :]",
        "test_gradients_of_each_dtype[3-4-5-counts1-dtype0-triton]",
    ),
]
MUTATIONS["grid_pool"] = [
    Mutation(
        "last_t = ((step + 1) * T + frames - 1) // frames",
        "last_t = tl.maximum((step + 1) * T // frames, first_t + 1)",
        "test_is_adaptive_avg_pool3d[(7, 5, (3, 2, 2))-torch.float16-triton]",
    ),
    Mutation(
        "last_w = (column * side // width, ((column + 1) * side + width - 1) // width)",
        "last_w = (column * side // width, (column + 1) * side // width)",
        "test_is_adaptive_avg_pool3d[(7, 5, (3, 2, 2))-torch.float16-triton]",
    ),
    Mutation(
        "mask=(k < places)[:, None]",
        "mask=(k < k + 1)[:, None]",
        "test_is_adaptive_avg_pool3d[(7, 5, (2, 2, 2))-torch.float32-triton]",
    ),
    Mutation("places.to(tl.float32)", "BLOCK_K", "test_is_adaptive_avg_pool3d[(7, 5, (2, 2, 2))-torch.float32-triton]"),
    Mutation(
        "line, column = (cell // width, cell % width)",
        "line, column = (cell // height, cell % height)",
        "test_is_adaptive_avg_pool3d[(7, 5, (2, 3, 1))-torch.bfloat16-triton]",
    ),
    Mutation("if OVER_TIME:", "if True:", "test_frames_are_chosen_evenly[7-3-triton]"),
    Mutation("p * x_stride_p)[:, None]", "p * C)[:, None]", "test_strides[<lambda>1-triton]"),
]
MUTATIONS["add_rms_norm"] = [
    Mutation(
        "rstd = tl.rsqrt(tl.sum(x * x) / D + eps)",
        "rstd = tl.rsqrt(tl.sum(x * x) / BLOCK_D + eps)",
        "test_equals_reference[(5, 33)-fp32-False-False-triton]",
    ),
    Mutation(
        "grad = rstd * (grad - unit * (tl.sum(grad * unit) / D))",
        "grad = rstd * grad",
        "test_equals_reference[(5, 33)-fp32-False-False-triton]",
    ),
    Mutation(
        "tl.minimum(first + group_rows, N)",
        "tl.minimum(first + 3, N)",
        "test_weight_gradient_over_groups_of_rows[13-5]",
    ),
    Mutation(
        "tl.store(partial_ptr + group * D + columns",
        "tl.store(partial_ptr + columns",
        "test_weight_gradient_over_groups_of_rows[13-5]",
    ),
    Mutation(
        "for first in tl.range(0, G, BLOCK_G,",
        "for first in tl.range(0, BLOCK_G, BLOCK_G,",
        "test_weight_gradient_over_groups_of_rows[523-40]",
    ),
    Mutation(
        "mask=(groups < G)[:, None] & inside[None, :]",
        "mask=inside[None, :]",
        "test_weight_gradient_over_groups_of_rows[13-5]",
    ),
    Mutation(
        "branch = grad.to(grad_branch_ptr.dtype.element_ty).to(tl.float32)",
        "branch = grad",
        "test_branch_back_in_e4m3[(5, 33)-bf16-False]",
    ),
    Mutation(
        "tl.max(magnitude(branch), 0)",
        "tl.max(branch.to(tl.int32, bitcast=True), 0)",
        "test_branch_back_in_e4m3[(5, 33)-bf16-False]",
    ),
    Mutation(
        "bits_ptr + row * D + columns, divided(branch",
        "bits_ptr + group * D + columns, divided(branch",
        "test_branch_back_in_e4m3[(2, 4096)-fp32 residual-True]",
    ),
    Mutation(
        "grad += grad_total.to(tl.float32)",
        "grad += 0",
        "test_equals_reference[(5, 33)-fp32 residual-True-False-triton]",
    ),
    Mutation(
        "y = (x * rstd * weight).to(y_ptr.dtype.element_ty)",
        "y = x * rstd * weight",
        "test_rows_in_e4m3[(2, 4096)-fp32 residual-True]",
    ),
    Mutation(
        "scale = scale_of(tl.max(magnitude(y), 0))\n        tl.store(scale_ptr + row",
        "scale = scale_of(tl.max(magnitude(y), 0))\n        tl.store(scale_ptr",
        "test_rows_in_e4m3[(5, 33)-fp32-True]",
    ),
]
MUTATIONS["merge_parts"] = [
    Mutation(
        "top = tl.maximum(lse, other_lse)",
        "top = lse * 0",
        "test_a_part_without_keys_and_far_scores_count_as_they_should[second-triton]",
    ),
    Mutation("share = tl.exp(other_lse - both)", "share = tl.exp(lse - both)", "test_is_attention_to_all_keys[triton]"),
    Mutation(
        "to_lse_row_stride, both, mask=real)",
        "to_lse_row_stride, both, mask=heads < num_heads - 1)",
        "test_is_attention_to_all_keys[triton]",
    ),
    Mutation("if BOTH:", "if not BOTH:", "test_the_last_rows_of_larger_tensors_in_place[triton]"),
    Mutation("+ row * lse_row_stride", "+ row", "test_any_shape"),
    Mutation("other_ptr + row * other_stride", "other_ptr + row * BLOCK_d", "test_is_attention_to_all_keys[triton]"),
]
MUTATIONS["swiglu"] = [
    Mutation(
        "return gate * tl.sigmoid(gate) * up",
        "return up * tl.sigmoid(up) * gate",
        "test_large_values_stay_finite[triton]",
    ),
    Mutation(
        "silu * (1 - sigmoid)), grad * silu", "silu), grad * silu", "test_equals_reference[shape1-torch.float32-triton]"
    ),
    Mutation(
        "out.to(out_ptr.dtype.element_ty), mask=inside",
        "out.to(out_ptr.dtype.element_ty), mask=columns < F - 1",
        "test_equals_reference[shape1-torch.float32-triton]",
    ),
    Mutation(
        "tl.store(grad_gate_ptr + F + columns",
        "tl.store(grad_gate_ptr + columns",
        "test_equals_reference[shape1-torch.float32-triton]",
    ),
    Mutation(
        "_product(gate, up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)",
        "_product(gate, up)",
        "test_rows_in_e4m3[shape4-torch.bfloat16]",
    ),
    Mutation(
        "tl.maximum(magnitude(grad_gate), magnitude(grad_up))",
        "magnitude(grad_up)",
        "test_rows_in_e4m3[shape1-torch.float32]",
    ),
    Mutation("    bits_ptr += row * 2 * F\n", "    bits_ptr += row * F\n", "test_rows_in_e4m3[shape1-torch.float32]"),
]
MUTATIONS["add_layer_norm"] = [
    Mutation(
        "centred = tl.where(inside, x - tl.sum(x) / D, 0.0)",
        "centred = x - tl.sum(x) / D",
        "test_equals_reference[(5, 33)-no branch-torch.float32-triton]",
    ),
    Mutation(
        "tl.sum(centred * centred) / D",
        "(tl.sum(x * x) / D - tl.sum(x) / D * (tl.sum(x) / D))",
        "test_rows_far_from_zero[triton]",
    ),
    Mutation(" / D + eps)", " / D + 1e-5)", "test_the_variance_counts[triton]"),
    Mutation(
        "        x = total.to(tl.float32)", "        x = x + branch", "test_the_norm_is_that_of_the_rounded_sum[triton]"
    ),
    Mutation(
        "y = centred * rstd * weight + bias", "y = centred * rstd * weight", "test_a_constant_row_is_the_offset[triton]"
    ),
    Mutation(
        "tl.store(total_ptr + row * D + columns",
        "tl.store(total_ptr + columns",
        "test_equals_reference[(5, 33)-add-torch.float32-triton]",
    ),
    Mutation("branch_ND.contiguous() if add", "branch_ND if add", "test_strided_inputs_are_left_alone[triton]"),
]
MUTATIONS["quick_gelu"] = [
    Mutation(
        "x * tl.sigmoid(1.702 * x)", "x * tl.sigmoid(1.7 * x)", "test_equals_reference[(5, 33)-torch.float32-triton]"
    ),
    Mutation(
        "inside = place < elements",
        "inside = place < elements - 1",
        "test_equals_reference[(5, 33)-torch.float32-triton]",
    ),
    Mutation("    x = x.contiguous()\n", "", "test_strided_input_is_left_alone[triton]"),
]
MUTATIONS["rope_qk"] = [
    Mutation("r -= turns * 0.00011730194091796875", "r -= turns * 0.000117302", "test_far_positions"),
    Mutation(
        "tl.where((quarter == 1) | (quarter == 2), -cos, cos)",
        "tl.where(quarter == 2, -cos, cos)",
        "test_far_positions",
    ),
    Mutation("        sin = -sin\n", "        sin = sin\n", "test_equals_reference[copy-shape1-torch.float32-triton]"),
    Mutation(
        "turned = (heads < rotated_heads)[:, None]",
        "turned = (heads < written_heads)[:, None]",
        "test_rotates_pairs_of_halves[triton]",
    ),
    Mutation(
        "heads = program % BLOCKS * BLOCK_A + tl",
        "heads = tl",
        "test_equals_reference[copy-shape4-torch.float32-triton]",
    ),
]
MUTATIONS["splice_video"] = [
    Mutation("-2 - source % 2", "-2", "test_rows_come_from_where_they_should[triton]"),
    Mutation(
        "mask=source < boundaries)", "mask=source < boundaries + 1)", "test_rows_come_from_where_they_should[triton]"
    ),
    Mutation(
        "row = tl.load(video_rows_ptr + video_row).to(tl.int64)",
        "row = video_row",
        "test_equals_reference[(False, True, True)-2-boundary-float32-float32-float32-float32-triton]",
    ),
    Mutation(
        "for first in range(0, V, BLOCK_V)",
        "for first in range(0, BLOCK_V, BLOCK_V)",
        "test_boundary_gradient_of_many_videos",
    ),
    Mutation(
        "mask=inside, other=0.0).to(tl.float32)\n    tl.store(grad_boundary_ptr",
        "mask=(columns < D)[None, :], other=0.0).to(tl.float32)\n    tl.store(grad_boundary_ptr",
        "test_boundary_gradient_of_many_videos",
    ),
]
MUTATIONS["adamw8bit_step"] = [
    Mutation("other=127)", "other=0)", "test_equals_reference[257-dtype1]"),
    Mutation("start // 256 + block\n    absmax2_ptr", "block\n    absmax2_ptr", "test_equals_reference[5000-dtype1]"),
    Mutation("random_tile((first + start) // 8", "random_tile(start // 8", "test_sharding_changes_nothing[triton]"),
    Mutation("if tl.load(skip_ptr) != 0:", "if tl.load(skip_ptr) < 0:", "test_skip_leaves_everything[triton]"),
    Mutation("bits ^= sign >> 31", "bits = bits", "test_codes_are_the_nearest[True-triton]"),
    Mutation(
        "(codes << 24) - bits - 1)",
        "(codes << 24) - bits)",
        "test_codes_beside_every_threshold_and_at_the_ends_of_bins[False]",
    ),
    Mutation(
        "(codes << 24) + 2 ** 24 + bits)",
        "(codes << 24) + 2 ** 24 + bits - 1)",
        "test_codes_beside_every_threshold_and_at_the_ends_of_bins[True]",
    ),
    Mutation("2.0 ** 74)", "2.0 ** 73)", "test_codes_beside_every_threshold_and_at_the_ends_of_bins[False]"),
    Mutation(", propagate_nan=tl.PropagateNan.ALL", "", "test_nan_stays_in_its_block[triton]"),
]
MUTATIONS["adamw_step"] = [
    Mutation("inside &= local >= -start", "inside &= local > -start", "test_equals_reference[256-5]"),
    Mutation(
        "tl.arange(0, BLOCKS * 256) - BEFORE", "tl.arange(0, BLOCKS * 256)", "test_sharding_changes_nothing[triton]"
    ),
    Mutation("first_group + start // 8", "first_group", "test_equals_reference[5000-0]"),
    Mutation("triton.cdiv(first % 8 + param.numel()", "triton.cdiv(param.numel()", "test_equals_reference[1020-5]"),
    Mutation(
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r0, r1))",
        "test_equals_reference[5000-0]",
    ),
    Mutation("tl.sqrt(v) * scale + eps", "tl.sqrt(v + eps) * scale", "test_equals_reference[5000-0]"),
    Mutation("if tl.load(skip_ptr) != 0:", "if tl.load(skip_ptr) < 0:", "test_skip_leaves_everything[triton]"),
]
MUTATIONS["frame_patchify"] = [
    Mutation("mask=(flat < VALUES)", "mask=(flat < VALUES - 1)", "test_any_mean_and_deviation[dtype0-triton]"),
    Mutation(
        "row * stride_h + column * stride_w", "row * stride_w + column * stride_h", "test_strides[<lambda>0-triton]"
    ),
    Mutation("(first + f + i) * VALUES", "(f + i) * VALUES", "test_clips_of_several_sizes[triton]"),
    Mutation(
        "scale = tl.div_rn(length.to(tl.float32), N * 1.0)",
        "scale = length.to(tl.float32) * (1 / N)",
        "test_bit_identical_to_the_chain[(62, 76, 28, 14)-torch.float16-triton]",
    ),
    Mutation("channel * 256 + byte", "byte", "test_any_mean_and_deviation[dtype0-triton]"),
    Mutation(
        "tl.where(inside, offset, 0.0)",
        "offset",
        "test_bit_identical_to_the_chain[(61, 35, 30, 7)-torch.float16-triton]",
    ),
    Mutation(
        "tl.where(channel == 1, scale_1, scale_2)",
        "scale_2",
        "test_bit_identical_to_the_chain[(56, 56, 56, 14)-torch.float16-triton]",
    ),
]
MUTATIONS["yuv_patchify"] = [
    Mutation(" - dark)", ")", "test_every_conversion[1-False-triton]"),
    Mutation(
        "y + ((u * u_green >> 16) + (v * v_green >> 16))",
        "y + (u * u_green + v * v_green >> 16)",
        "test_every_conversion[1-False-triton]",
    ),
    Mutation("tl.minimum(tl.maximum(number, 0), 255)", "tl.minimum(number, 255)", "test_samples_at_the_ends[0-triton]"),
    Mutation("tl.minimum(tl.maximum(number, 0), 255)", "tl.maximum(number, 0)", "test_samples_at_the_ends[255-triton]"),
    Mutation("(row >> 1) * uv_row", "((row + 1) >> 1) * uv_row", "test_every_conversion[6-True-triton]"),
    Mutation("if any((run.u[1] != run.v[1] for run in runs))", "if False", "test_strides[chroma of two kinds-triton]"),
    Mutation("blue = y + (u * u_blue >> 16)", "blue = y + (v * u_blue >> 16)", "test_every_conversion[6-True-triton]"),
    Mutation("+ start % K // 3", "", "test_the_bits_of_converted_frames[(240, 320, 56, 14)-torch.bfloat16-triton]"),
    Mutation("*run.y[1], *run.u[1]", "*run.y[1], *run.y[1]", "test_strides[a surface-triton]"),
    Mutation(
        "(tuple(x.shape), x.stride(), x.dtype)",
        "(tuple(x.shape), frames[0][0].stride(), x.dtype)",
        "test_frames_of_several_videos[triton]",
    ),
    Mutation(
        "run.first + run.count - first)", "run.first + run.count - first - 1)", "test_frames_of_several_videos[triton]"
    ),
]
MUTATIONS["quantize_fp8"] = [
    Mutation("x_ptr += row * row_stride", "x_ptr += row * channels", "test_strided_rows[columns]"),
    Mutation(
        "largest = tl.maximum(largest, magnitude(x))",
        "largest = magnitude(x)",
        "test_a_row_uses_the_whole_range[64-triton]",
    ),
    Mutation(
        "x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)",
        "x = x",
        "test_every_number_and_every_tie[triton]",
    ),
    Mutation(
        "out_ptr += row * channels", "out_ptr += row * (channels - 1)", "test_equals_reference[shape2-dtype0-None]"
    ),
]
MUTATIONS["rope_keys"] = [
    Mutation(
        "(row * row_heads + first_head)",
        "((row + C) * row_heads + first_head)",
        "test_equals_reference[(7, 4, 4, 8)-behind constant rows-torch.bfloat16-triton]",
    ),
    Mutation(
        "turns = (row >= 0) & (block < BLOCKS)",
        "turns = row >= 0",
        "test_equals_reference[(7, 4, 4, 8)-shared-torch.float16-triton]",
    ),
    Mutation(
        "head = program % Q_BLOCKS * BLOCK_A",
        "head = 0",
        "test_equals_reference[(2, 9, 17, 200)-shared-torch.bfloat16-triton]",
    ),
    Mutation(
        "q_ptr + row * q_heads",
        "q_ptr + row * num_heads",
        "test_in_place_writes_no_key_that_is_placed_again[shared]",
    ),
    Mutation(
        "outs = [last_rows(x, count) for",
        "outs = [x[:count] for",
        "test_rows_behind_others_have_the_bits_of_rows_alone[4-False-triton]",
    ),
    Mutation("torch.autograd.graph.increment_version(qkv_NE)", "pass", "test_autograd_sees_what_is_overwritten"),
]
MUTATIONS["rope_keys_backward"] = [
    Mutation(
        "first, second = turned_back(first, second, cos, sin)",
        "first, second = turned_back(first, second, sin, cos)",
        "test_two_parts_are_added[in order-keys behind-torch.float32-triton]",
    ),
    Mutation(
        "place = tl.load(places_ptr + i).to(tl.int64)",
        "place = i",
        "test_two_parts_are_added[shared-keys behind-torch.float16-triton]",
    ),
    Mutation("inside & (place < keys)", "inside", "test_two_parts_are_added[shared-keys behind-torch.float16-triton]"),
    Mutation("& (place < last)", "", "test_two_parts_are_added[shared-keys in the middle again-torch.bfloat16-triton]"),
    Mutation(
        "more_ptr += (place - first) * more_stride",
        "more_ptr += place * more_stride",
        "test_two_parts_are_added[shared-keys at the end again-torch.float32-triton]",
    ),
    Mutation(
        "begin_second = first_query.to(tl.int64)",
        "begin_second = row",
        "test_two_parts_are_added[shared-keys behind-torch.float16-triton]",
    ),
    Mutation(
        "return (first1 + second1, first2 + second2)",
        "return (first1, first2)",
        "test_two_parts_are_added[in order-keys behind-torch.float32-triton]",
    ),
]
MUTATIONS["rope_keys_fp8"] = [
    Mutation(
        "top = tl.maximum(top, _largest(q1, q2))",
        "top = _largest(k1, k2)",
        "test_is_the_gradient_quantised_afterwards[(7, 4, 4, 8)-in order-torch.float32]",
    ),
    Mutation(
        "q1, q2 = turned_back(q1, q2, cos, sin)",
        "q1, q2 = turned_back(q1, q2, sin, cos)",
        "test_is_the_gradient_quantised_afterwards[(7, 4, 4, 8)-in order-torch.float32]",
    ),
    Mutation(
        "    bits_ptr += num_heads * 2 * half\n",
        "    bits_ptr += kv_heads * 2 * half\n",
        "test_is_the_gradient_quantised_afterwards[(9, 6, 2, 6)-in order-torch.bfloat16]",
    ),
    Mutation(
        "return (first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32))",
        "return (first, second)",
        "test_is_the_gradient_quantised_afterwards[(9, 6, 2, 6)-in order-torch.bfloat16]",
    ),
    Mutation(
        "place = tl.load(places_ptr + i).to(tl.int64)",
        "place = i",
        "test_is_the_gradient_quantised_afterwards[(7, 4, 4, 8)-shared-torch.float16]",
    ),
    Mutation(
        "row + 1, first_query, row + 1", "row + 1, 0, row + 1", "test_of_two_parts[in order-keys behind-torch.float32]"
    ),
    Mutation(
        "more_v_ptr, more_v_stride, place, keys, first_key",
        "more_v_ptr, more_v_stride, place, keys, keys",
        "test_of_two_parts[shared-keys in the middle again-torch.bfloat16]",
    ),
]
