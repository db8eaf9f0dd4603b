// The launchers of the CUDA kernels: raw pointers, sizes and strides, so that the .cu files need no torch header (nvcc
// parses every header once per architecture). Each throws std::runtime_error with the kernel's name if a launch fails.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vadit::cuda {

enum class Type { kFloat32, kBFloat16 };

// Rows of `total` that one block walks where it leaves one row of partial sums behind: enough blocks to fill a large
// GPU several times, but no more than `most` rows. Depends on the shape alone, so that sums come out the same anywhere.
inline int64_t rows_per_block(int64_t total, int64_t most) {
  constexpr int64_t kBlocks = 2048;
  return std::clamp<int64_t>((total + kBlocks - 1) / kBlocks, 1, most);
}

// A weight (stride 0) or a modulation, whose rows of an image lie `stride` apart, in its own dtype; data is null where
// there is none.
struct Row {
  const void* data;
  Type type;
  int64_t stride;
};

// Where sums are written, in the dtype that is wanted; data is null where they are not.
struct Output {
  Output(void* data, Type type) : data(data), type(type) {}
  Output(float* data) : Output(data, Type::kFloat32) {}

  void* data;
  Type type;
};

// x, and h, (images, rows, width), contiguous.
struct NormShape {
  int64_t images, rows, width;
  int64_t backward_chunk() const { return rows_per_block(images * rows, 32); }
  // Blocks per image, each of which writes one row of partial sums.
  int64_t backward_chunks() const { return (rows + backward_chunk() - 1) / backward_chunk(); }
};

// x: what is normed or, forward, what h is added to; h, gate and bias are null where there is no sum.
struct NormInput {
  const void *x, *h;
  Row gate, bias, weight, scale, shift;
  float eps;
};

// Of x, the sum and their gradients; of y and h and theirs. Alike, or float32 and bfloat16.
struct NormTypes {
  Type x, y;
};

void rms_norm(NormTypes types, NormShape shape, NormInput input, void* y, void* stream);
void gated_norm(NormTypes types, NormShape shape, NormInput input, void* total, void* y, void* stream);

// The gradients that come: of the norm, and (gated) of the sum.
struct NormSlopes {
  const void *dy, *dtotal;
};

// partial: 2, gated 4, times images * backward_chunks() * width floats.
struct NormGradients {
  void *dx, *dh;
  Output dgate, dbias, dweight, dscale, dshift;
  float* partial;
};
void rms_norm_backward(
    NormTypes types, NormShape shape, NormInput input, NormSlopes slopes, NormGradients gradients, void* stream);
void gated_norm_backward(
    NormTypes types, NormShape shape, NormInput input, NormSlopes slopes, NormGradients gradients, void* stream);

// x12 (rows, 2 width), y (rows, width), bias (2 width) or null, contiguous.
void swiglu(Type type, int64_t rows, int64_t width, const void* x12, const float* bias, void* y, void* stream);

// Rows that one block of the backward pass sums up, and the rows of partial sums that are left.
inline int64_t swiglu_chunk(int64_t rows) { return rows_per_block(rows, 64); }
inline int64_t swiglu_partial_rows(int64_t rows) { return (rows + swiglu_chunk(rows) - 1) / swiglu_chunk(rows); }
// dbias (2 width) and partial (swiglu_partial_rows(), 2 width) are used where there is a bias.
void swiglu_backward(
    Type type, int64_t rows, int64_t width, const void* dy, const void* x12, const float* bias, void* dx12,
    float* dbias, float* partial, void* stream);

// x (images, rows, width), contiguous, its channels in groups; a block of a pass takes `chunk` rows of an image.
struct GroupShape {
  int64_t images, rows, width, groups, chunk, chunks;
  GroupShape(int64_t images_, int64_t rows_, int64_t width_, int64_t groups_)
      : images(images_), rows(rows_), width(width_), groups(groups_) {
    chunk = std::max<int64_t>(rows_per_block(images * rows * ((width + 127) / 128), 512), 32);
    chunks = (rows + chunk - 1) / chunk;
  }
};
struct GroupInput {
  const void* x;
  const float *weight, *bias, *mean, *rstd;
  bool silu;
};
// partial: 2 * images * chunks * width floats, in both; totals: 2 * images * width; means: 2 * images * groups.
void group_norm_silu(
    Type type, GroupShape shape, GroupInput input, float eps, float* mean, float* rstd, float* partial, void* y,
    void* stream);
struct GroupGradients {
  void* dx;
  float *dweight, *dbias, *partial, *totals, *means;
};
void group_norm_silu_backward(
    Type type, GroupShape shape, GroupInput input, const void* dy, GroupGradients gradients, void* stream);

// Heads of one of q, k, v: (B, H, N, K) with stride 1 along K.
struct HeadShape {
  int64_t batch, heads, tokens, width;
  int64_t rows() const { return batch * tokens; }
};
struct HeadStrides {
  int64_t image, head, token;
};
struct Heads {
  const void* data;
  HeadStrides strides;
};
struct MutableHeads {
  void* data;
  HeadStrides strides;
};

struct RopeTables {
  const float *cos, *sin;  // (N, K), contiguous
  float eps;
};

// What q, k and v (its data null where nothing is done to it) get before the rotation: bias is (3, heads, width) or null.
struct RopeInput {
  Heads in[3];
  const float* weight[2];
  const float* bias;
};
void rope(
    Type type, HeadShape shape, const RopeInput& input, RopeTables tables, const MutableHeads out[3], void* stream);

// Tokens per block of the backward pass (four warps take turns), and the rows of sums for the bias that it leaves.
inline int64_t rope_chunk(HeadShape shape) { return 4 * rows_per_block(shape.rows(), 16); }
inline int64_t rope_partial_rows(HeadShape shape) {
  return (shape.rows() + rope_chunk(shape) - 1) / rope_chunk(shape);
}
// dy[2], dv: where its data is not null it is copied to out[2]. weight_sums: rope_partial_rows() * heads * 2 * width
// floats, used where a weight is given, which may be fewer; bias_sums: rope_partial_rows() * 3 * heads * width.
struct RopeGradients {
  Heads dy[3];
  MutableHeads out[3];
  float* dweight[2];
  float* dbias;
  float *weight_sums, *bias_sums;
};
// input.in[i].data may be null where input.weight[i] is.
void rope_backward(
    Type type, HeadShape shape, const RopeInput& input, RopeTables tables, const RopeGradients& gradients,
    void* stream);

// features (B, D, N) with strides (image, channel, 1).
struct FeatureShape {
  int64_t batch, channels, positions;
  int64_t stride_image, stride_channel;
};
void vf_gram(Type type, FeatureShape shape, const void* features, float* cosines, float* inverse_norm, void* stream);

// Blocks of vf_distmat, each of which writes one partial sum.
constexpr int64_t kGramTile = 64;
inline int64_t gram_tiles(int64_t batch, int64_t positions) {
  const int64_t side = (positions + kGramTile - 1) / kGramTile;
  return batch * (side * (side + 1) / 2);
}
void vf_distmat(
    FeatureShape u_shape, const float* u, FeatureShape v_shape, const float* v, const float* cosines, float margin,
    float* partial, float* loss, int8_t* sign, void* stream);

}  // namespace vadit::cuda
