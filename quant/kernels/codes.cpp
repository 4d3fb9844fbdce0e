// Products of stored codes with rows of activations on x86 processors, and a step of decoding that
// is made of them. Compiled by quant/kernels/native.py; called as torch.ops.stillhouse_cpu.*
//
// Formula. A weight is w = (q - z) s with codes q >= 0 and scale s, zero point z per group of columns.
// A row x of activations is quantized in blocks of 32 columns, as llama.cpp does: a = max|x| / 127,
// p = round(x / a) in -127..127. Per group, with sums of whole numbers and the rest in float32,
//     sum_k w_k x_k  ~  s ( sum_blocks a_b (sum_k q_k p_k)  -  z sum_blocks a_b (sum_k p_k) )
// which is exact but for the rounding of x: zero points need not be whole.
//
// Layout. 16 rows of the weight lie side by side, so that a vector register holds one float32 sum per
// row and no sum over its lanes is ever needed. One code in 4 bits ("narrow", codes up to 15):
// byte [16 rows][columns / 8][16][4], the low nibble of (r, j) is column 8 c + j, the high one
// column 8 c + 4 + j. In 8 bits ("wide"): byte [16 rows][columns / 4][16][4], column 4 c + j. Scale
// and zero point are float16 [16 rows][groups][2][16]. Rows are padded with zeros to whole 16s.
//
// Instructions. AVX2: maddubs multiplies u8 x s8 and adds pairs in int16. 15 * 127 * 2 * 8 steps of
// a block = 30,480 fits; a wide code would not, so its two nibbles are summed apart. AVX512-VNNI:
// dpbusd adds four products in int32, for narrow and wide codes alike.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include <immintrin.h>

namespace {

using at::Tensor;

constexpr int64_t LANES = 16;  // rows of the weight in a block
constexpr int64_t BLOCK = 32;  // columns of activations that share a scale
constexpr int64_t GRAIN = 1 << 16;  // multiplications that are worth a thread

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")))

// ---------------------------------------------------------------------------- floats of any width

AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

AVX2 inline __m256 load8(const c10::BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 inline __m256 load8(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

AVX2 inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <typename T>
AVX2 float dot(const float* x, const T* w, int64_t n) {
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    a = _mm256_fmadd_ps(load8(x + i), load8(w + i), a);
    b = _mm256_fmadd_ps(load8(x + i + 8), load8(w + i + 8), b);
    c = _mm256_fmadd_ps(load8(x + i + 16), load8(w + i + 16), c);
    d = _mm256_fmadd_ps(load8(x + i + 24), load8(w + i + 24), d);
  }
  for (; i + 8 <= n; i += 8) a = _mm256_fmadd_ps(load8(x + i), load8(w + i), a);
  float sum = sum8(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
  for (; i < n; ++i) sum += x[i] * static_cast<float>(w[i]);
  return sum;
}

// y += f * v
template <typename T>
AVX2 void add_scaled(float* y, float f, const T* v, int64_t n) {
  const __m256 factor = _mm256_set1_ps(f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(factor, load8(v + i), _mm256_loadu_ps(y + i)));
  for (; i < n; ++i) y[i] += f * static_cast<float>(v[i]);
}

// Calls f with a typed pointer to what a tensor holds.
template <typename F>
auto with_type(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return f(t.const_data_ptr<float>());
    case at::kBFloat16:
      return f(t.const_data_ptr<c10::BFloat16>());
    default:
      TORCH_CHECK(t.scalar_type() == at::kHalf, "stillhouse_cpu: no path for ", t.scalar_type());
      return f(t.const_data_ptr<c10::Half>());
  }
}

// ------------------------------------------------------------------------- quantized activations

// Rows of activations as whole numbers: value [rows][columns], scale a [rows][columns / 32] and,
// per group of the weight, sum of a p [rows][groups].
struct Quantized {
  std::vector<int8_t> value;
  std::vector<float> scale, sum;

  void resize(int64_t rows, int64_t columns, int64_t group) {
    value.resize(rows * columns);
    scale.resize(rows * columns / BLOCK);
    sum.resize(rows * columns / group);
  }
};

template <typename T>
AVX2 void quantize_row(
    const T* x, int64_t columns, int64_t group, int8_t* value, float* scale, float* sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < columns / group; ++g) {
    float total = 0;
    for (int64_t at = g * group; at < (g + 1) * group; at += BLOCK) {
      __m256 part[4];
      // The largest magnitude by its bits, of which NaN has the largest: it makes the row NaN.
      __m256i most = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        part[i] = load8(x + at + 8 * i);
        most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, _mm256_castps_si256(part[i])));
      }
      __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
      m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
      m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
      const float largest = _mm_cvtss_f32(_mm_castsi128_ps(m));
      const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
      __m256i whole[4];
      for (int i = 0; i < 4; ++i)  // to the nearest
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], inverse));
      __m256i added = _mm256_add_epi32(
          _mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3]));
      __m128i s = _mm_add_epi32(
          _mm256_castsi256_si128(added), _mm256_extracti128_si256(added, 1));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
      const float step = largest / 127.0f;
      total += step * static_cast<float>(_mm_cvtsi128_si32(s));
      scale[at / BLOCK] = step;
      // packs works within halves of 128 bits; the permutation puts the dwords into order.
      const __m256i low = _mm256_packs_epi32(whole[0], whole[1]);
      const __m256i high = _mm256_packs_epi32(whole[2], whole[3]);
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i bytes =
          _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(value + at), bytes);
    }
    sum[g] = total;
  }
}

template <typename T>
void quantize(Quantized& q, const T* x, int64_t rows, int64_t columns, int64_t group) {
  q.resize(rows, columns, group);
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / columns), [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m)
      quantize_row(x + m * columns, columns, group, q.value.data() + m * columns,
                   q.scale.data() + m * columns / BLOCK, q.sum.data() + m * columns / group);
  });
}

// ------------------------------------------------------------------------------ weights in codes

struct Weight {
  const uint8_t* codes = nullptr;  // of a dense weight: null
  const c10::Half* grid = nullptr;  // scales and zero points
  Tensor dense;  // [rows, columns], or undefined
  Tensor bias;  // [rows], or undefined
  int64_t rows = 0, columns = 0, group = 0;
  bool wide = false;

  int64_t block_bytes() const { return LANES * columns / (wide ? 1 : 2); }
};

AVX2 inline __m256i dword8(const int8_t* p) {
  return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(p));
}

// 16 rows of the weight times M rows of activations: y[m * stride + r].
template <int M, bool WIDE>
AVX2 void block_avx2(const Weight& w, int64_t block, const int8_t* value, const float* scale,
                     const float* sum, float* y, int64_t stride) {
  const int64_t columns = w.columns, group = w.group, groups = columns / group;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i sixteens = _mm256_set1_epi16(16);
  for (int half = 0; half < 2; ++half) {  // 8 of the 16 rows
    const uint8_t* code = w.codes + block * w.block_bytes() + 32 * half;
    const c10::Half* grid = w.grid + block * groups * 2 * LANES + 8 * half;
    __m256 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, grid += 2 * LANES) {
      __m256 part[M];
      for (int m = 0; m < M; ++m) part[m] = _mm256_setzero_ps();
      for (int64_t at = g * group; at < (g + 1) * group; at += BLOCK) {
        __m256i low[M], high[WIDE ? M : 1];
        for (int m = 0; m < M; ++m) low[m] = _mm256_setzero_si256();
        if constexpr (WIDE)
          for (int m = 0; m < M; ++m) high[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int step = 0; step < (WIDE ? 8 : 4); ++step, code += 64) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
          const __m256i a = _mm256_and_si256(both, nibble);
          const __m256i b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const int8_t* p = value + m * columns + at + (WIDE ? 4 : 8) * step;
            if constexpr (WIDE) {
              low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(a, dword8(p)));
              high[m] = _mm256_add_epi16(high[m], _mm256_maddubs_epi16(b, dword8(p)));
            } else {
              low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(a, dword8(p)));
              low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(b, dword8(p + 4)));
            }
          }
        }
        for (int m = 0; m < M; ++m) {
          __m256i whole = _mm256_madd_epi16(low[m], ones);
          if constexpr (WIDE)
            whole = _mm256_add_epi32(whole, _mm256_madd_epi16(high[m], sixteens));
          const __m256 a = _mm256_set1_ps(scale[m * (columns / BLOCK) + at / BLOCK]);
          part[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), a, part[m]);
        }
      }
      const __m256 s = load8(grid), z = load8(grid + LANES);
      for (int m = 0; m < M; ++m) {
        const __m256 sums = _mm256_set1_ps(sum[m * groups + g]);
        total[m] = _mm256_fmadd_ps(s, _mm256_fnmadd_ps(z, sums, part[m]), total[m]);
      }
    }
    for (int m = 0; m < M; ++m) _mm256_storeu_ps(y + m * stride + 8 * half, total[m]);
  }
}

template <int M, bool WIDE>
VNNI void block_vnni(const Weight& w, int64_t block, const int8_t* value, const float* scale,
                     const float* sum, float* y, int64_t stride) {
  const int64_t columns = w.columns, group = w.group, groups = columns / group;
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t* code = w.codes + block * w.block_bytes();
  const c10::Half* grid = w.grid + block * groups * 2 * LANES;
  __m512 total[M];
  for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, grid += 2 * LANES) {
    __m512 part[M];
    for (int m = 0; m < M; ++m) part[m] = _mm512_setzero_ps();
    for (int64_t at = g * group; at < (g + 1) * group; at += BLOCK) {
      __m512i low[M], high[M];  // two sums each, or every product would wait for the last
      for (int m = 0; m < M; ++m) low[m] = high[m] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        __m512i a, b;
        if constexpr (WIDE) {
          a = _mm512_loadu_si512(code);
          b = _mm512_loadu_si512(code + 64);
          code += 128;
        } else {
          const __m512i both = _mm512_loadu_si512(code);
          a = _mm512_and_si512(both, nibble);
          b = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          code += 64;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const int32_t* p =
              reinterpret_cast<const int32_t*>(value + m * columns + at + 8 * step);
          low[m] = _mm512_dpbusd_epi32(low[m], a, _mm512_set1_epi32(p[0]));
          high[m] = _mm512_dpbusd_epi32(high[m], b, _mm512_set1_epi32(p[1]));
        }
      }
      for (int m = 0; m < M; ++m) {
        const __m512 a = _mm512_set1_ps(scale[m * (columns / BLOCK) + at / BLOCK]);
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(low[m], high[m]));
        part[m] = _mm512_fmadd_ps(whole, a, part[m]);
      }
    }
    const __m512 s = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(grid)));
    const __m512 z =
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(grid + LANES)));
    for (int m = 0; m < M; ++m) {
      const __m512 sums = _mm512_set1_ps(sum[m * groups + g]);
      total[m] = _mm512_fmadd_ps(s, _mm512_fnmadd_ps(z, sums, part[m]), total[m]);
    }
  }
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(y + m * stride, total[m]);
}

template <int M>
void block_product(const Weight& w, int64_t block, const Quantized& x, int64_t row, float* y,
                   int64_t stride, bool vnni) {
  const int8_t* value = x.value.data() + row * w.columns;
  const float* scale = x.scale.data() + row * w.columns / BLOCK;
  const float* sum = x.sum.data() + row * w.columns / w.group;
  if (vnni)
    (w.wide ? block_vnni<M, true> : block_vnni<M, false>)(w, block, value, scale, sum, y, stride);
  else
    (w.wide ? block_avx2<M, true> : block_avx2<M, false>)(w, block, value, scale, sum, y, stride);
}

// Rows `16 block ...` of the product with all rows of x; what is padding is not written.
template <typename T>
void block_rows(const Weight& w, int64_t block, const Quantized& x, int64_t rows, T* y,
                bool vnni) {
  float made[4 * LANES];
  const int64_t first = block * LANES, count = std::min(LANES, w.rows - first);
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t some = std::min<int64_t>(4, rows - row);
    switch (some) {
      case 1: block_product<1>(w, block, x, row, made, LANES, vnni); break;
      case 2: block_product<2>(w, block, x, row, made, LANES, vnni); break;
      case 3: block_product<3>(w, block, x, row, made, LANES, vnni); break;
      default: block_product<4>(w, block, x, row, made, LANES, vnni);
    }
    for (int64_t m = 0; m < some; ++m)
      for (int64_t r = 0; r < count; ++r)
        y[(row + m) * w.rows + first + r] = static_cast<T>(made[m * LANES + r]);
  }
}

int64_t blocks_of(const Weight& w) { return (w.rows + LANES - 1) / LANES; }

Weight weight_of(const Tensor& codes, const Tensor& grid, int64_t rows, int64_t columns) {
  TORCH_CHECK(codes.scalar_type() == at::kByte && codes.is_contiguous(), "codes: uint8, contiguous");
  TORCH_CHECK(grid.scalar_type() == at::kHalf && grid.is_contiguous() && grid.dim() == 4 &&
              grid.size(2) == 2 && grid.size(3) == LANES, "grid: float16 [blocks, groups, 2, 16]");
  Weight w;
  w.rows = rows;
  w.columns = columns;
  w.group = columns / grid.size(1);
  const int64_t blocks = blocks_of(w), weights = blocks * LANES * columns;
  w.wide = codes.numel() == weights;
  TORCH_CHECK(grid.size(0) == blocks && w.group * grid.size(1) == columns &&
              w.group % BLOCK == 0 && (w.wide || 2 * codes.numel() == weights),
              "codes ", codes.sizes(), " and grid ", grid.sizes(), " are of no weight [", rows,
              ", ", columns, "]");
  w.codes = codes.const_data_ptr<uint8_t>();
  w.grid = grid.const_data_ptr<c10::Half>();
  return w;
}

// x [m, columns] times W^T, in x's dtype.
Tensor product(const Tensor& x, const Tensor& codes, const Tensor& grid, int64_t rows, bool vnni) {
  TORCH_CHECK(x.dim() == 2, "x: [rows, columns]");
  const Tensor held = x.contiguous();
  const Weight w = weight_of(codes, grid, rows, x.size(1));
  const int64_t count = x.size(0);
  Tensor y = at::empty({count, rows}, x.options());
  Quantized q;
  with_type(held, [&](auto* p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    quantize(q, p, count, w.columns, w.group);
    T* out = y.mutable_data_ptr<T>();
    const int64_t work = LANES * w.columns * std::max<int64_t>(1, count);
    at::parallel_for(0, blocks_of(w), std::max<int64_t>(1, GRAIN / work),
                     [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) block_rows(w, b, q, count, out, vnni);
    });
  });
  return y;
}

Tensor product_shape(const Tensor& x, const Tensor&, const Tensor&, c10::SymInt rows, bool) {
  return at::empty_symint({x.sym_size(0), rows}, x.options());
}

AVX2 inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

AVX2 inline void store8(c10::BFloat16* p, __m256 v) {  // to the nearest, ties to even
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i most = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i words = _mm256_srli_epi32(most, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

AVX2 inline void store8(c10::Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// The 16 rows of a block as floats, (q - z) s as the plain path rounds it: y[r * columns + k].
template <typename T>
AVX2 void dequantize_block(const Weight& w, int64_t block, T* y, int64_t count) {
  const int64_t groups = w.columns / w.group;
  const c10::Half* grid = w.grid + block * groups * 2 * LANES;
  const __m128i nibble = _mm_set1_epi8(15);
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* code = w.codes + block * w.block_bytes() + 4 * r;
    for (int64_t g = 0; g < groups; ++g) {
      const __m256 s = _mm256_set1_ps(static_cast<float>(grid[g * 2 * LANES + r]));
      const __m256 z = _mm256_set1_ps(static_cast<float>(grid[g * 2 * LANES + LANES + r]));
      for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 8) {
        __m128i bytes;
        if (w.wide) {
          const int32_t* pair = reinterpret_cast<const int32_t*>(code);
          bytes = _mm_unpacklo_epi32(_mm_cvtsi32_si128(pair[0]), _mm_cvtsi32_si128(pair[16]));
          code += 128;
        } else {
          const __m128i both = _mm_cvtsi32_si128(*reinterpret_cast<const int32_t*>(code));
          bytes = _mm_unpacklo_epi32(_mm_and_si128(both, nibble),
                                     _mm_and_si128(_mm_srli_epi16(both, 4), nibble));
          code += 64;
        }
        const __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        store8(y + r * w.columns + k, _mm256_mul_ps(_mm256_sub_ps(q, z), s));
      }
    }
  }
}

// The weight [rows, columns] of these codes in `like`'s dtype.
Tensor dequantize(const Tensor& like, const Tensor& codes, const Tensor& grid, int64_t rows,
                  int64_t columns) {
  const Weight w = weight_of(codes, grid, rows, columns);
  Tensor y = at::empty({rows, columns}, like.options());
  with_type(y, [&](auto* p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    T* out = y.mutable_data_ptr<T>();
    at::parallel_for(0, blocks_of(w), std::max<int64_t>(1, GRAIN / (LANES * columns)),
                     [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b)
        dequantize_block(w, b, out + b * LANES * columns, std::min(LANES, rows - b * LANES));
    });
  });
  return y;
}

Tensor dequantize_shape(const Tensor& like, const Tensor&, const Tensor&, c10::SymInt rows,
                        c10::SymInt columns) {
  return at::empty_symint({rows, columns}, like.options());
}

// ------------------------------------------------------------------------------ a step of decoding

AVX2 inline __m256 exp8(__m256 x) {  // e^x to 2e-7: 2^n times Cephes' polynomial
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}

float at_index(const Tensor& t, int64_t i) {
  return with_type(t, [&](auto* p) { return static_cast<float>(p[i]); });
}

void to_floats(const Tensor& t, float* y) {
  with_type(t, [&](auto* p) {
    for (int64_t i = 0; i < t.numel(); ++i) y[i] = static_cast<float>(p[i]);
  });
}

// Rows `16 block ...` of W x + b, for one row x and its quantized form: 16 floats, padding too.
void one_block(const Weight& w, int64_t block, const float* x, const Quantized& q, float* y,
               bool vnni) {
  const int64_t first = block * LANES, count = std::min(LANES, w.rows - first);
  if (w.codes != nullptr)
    block_product<1>(w, block, q, 0, y, LANES, vnni);
  else
    with_type(w.dense, [&](auto* p) {
      for (int64_t r = 0; r < count; ++r) y[r] = dot(x, p + (first + r) * w.columns, w.columns);
    });
  if (w.bias.defined())
    for (int64_t r = 0; r < count; ++r) y[r] += at_index(w.bias, first + r);
}

// One row of floats, quantized for each size of groups of the weights that it is multiplied by.
struct Input {
  const float* x;
  int64_t columns;
  std::vector<std::pair<int64_t, Quantized>> forms;
  Quantized none;

  void set(const float* row, int64_t width) {
    x = row;
    columns = width;
    forms.clear();
  }
  const Quantized& of(const Weight& w) {
    if (w.codes == nullptr) return none;
    for (auto& [group, q] : forms)
      if (group == w.group) return q;
    forms.emplace_back(w.group, Quantized());
    quantize(forms.back().second, x, 1, columns, w.group);
    return forms.back().second;
  }
};

// y[i] = W[i] x + b[i] for up to three weights, their blocks dealt to the threads together.
void products(std::initializer_list<std::pair<const Weight*, float*>> list, Input& input,
              bool vnni) {
  struct Part { const Weight* w; float* y; const Quantized* q; int64_t end; };
  input.forms.reserve(list.size());  // references to what is in it are kept
  std::vector<Part> parts;
  int64_t blocks = 0;
  for (auto [w, y] : list) {
    blocks += blocks_of(*w);
    parts.push_back({w, y, &input.of(*w), blocks});
  }
  const int64_t grain = std::max<int64_t>(1, GRAIN / (LANES * input.columns));
  at::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    size_t i = 0;
    for (int64_t b = from; b < to; ++b) {
      while (b >= parts[i].end) ++i;
      const Part& part = parts[i];
      const int64_t block = b - (i ? parts[i - 1].end : 0);
      float made[LANES];
      one_block(*part.w, block, input.x, *part.q, made, vnni);
      std::copy_n(made, std::min(LANES, part.w->rows - block * LANES), part.y + block * LANES);
    }
  });
}

// silu(gate x) * (up x)
AVX2 void gated_range(const Weight& gate, const Weight& up, const Quantized& g, const Quantized& u,
                      const float* x, float* y, int64_t from, int64_t to, bool vnni) {
  for (int64_t b = from; b < to; ++b) {
    float a[LANES] = {}, c[LANES] = {};
    one_block(gate, b, x, g, a, vnni);
    one_block(up, b, x, u, c, vnni);
    for (int i = 0; i < 16; i += 8) {
      const __m256 v = load8(a + i);
      const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), v));
      const __m256 silu = _mm256_div_ps(v, _mm256_add_ps(e, _mm256_set1_ps(1.0f)));
      _mm256_storeu_ps(a + i, _mm256_mul_ps(silu, load8(c + i)));
    }
    std::copy_n(a, std::min(LANES, gate.rows - b * LANES), y + b * LANES);
  }
}

void normalize(const float* x, const Tensor& weight, int64_t n, double eps, float* y) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float factor = static_cast<float>(1.0 / std::sqrt(squares / n + eps));
  with_type(weight, [&](auto* w) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(w[i]) * (x[i] * factor);
  });
}

// Rotary embedding of one head, the two halves of which form the pairs.
void rotate(float* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const float a = x[i], b = x[i + n / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + n / 2] = b * cos[i + n / 2] + a * sin[i + n / 2];
  }
}

// softmax(q K^T) V of one head over `count` positions; scores: room for that many, rounded up to 8.
template <typename T>
AVX2 void attend(const float* q, const T* k, const T* v, int64_t count, int64_t n, float factor,
                 float* scores, float* y) {
  float most = -INFINITY;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = factor * dot(q, k + t * n, n);
    most = std::max(most, scores[t]);
  }
  __m256 sums = _mm256_setzero_ps();
  for (int64_t t = count; t % 8; ++t) scores[t] = -INFINITY;
  for (int64_t t = 0; t < count; t += 8) {
    const __m256 difference = _mm256_sub_ps(load8(scores + t), _mm256_set1_ps(most));
    const __m256 there = _mm256_cmp_ps(difference, _mm256_set1_ps(-INFINITY), _CMP_GT_OQ);
    const __m256 e = _mm256_and_ps(there, exp8(difference));
    _mm256_storeu_ps(scores + t, e);
    sums = _mm256_add_ps(sums, e);
  }
  const float share = 1.0f / sum8(sums);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
    for (int64_t t = 0; t < count; ++t) {
      const __m256 p = _mm256_set1_ps(scores[t]);
      const T* row = v + t * n + i;
      a = _mm256_fmadd_ps(p, load8(row), a);
      b = _mm256_fmadd_ps(p, load8(row + 8), b);
      c = _mm256_fmadd_ps(p, load8(row + 16), c);
      d = _mm256_fmadd_ps(p, load8(row + 24), d);
    }
    const __m256 s = _mm256_set1_ps(share);
    _mm256_storeu_ps(y + i, _mm256_mul_ps(a, s));
    _mm256_storeu_ps(y + i + 8, _mm256_mul_ps(b, s));
    _mm256_storeu_ps(y + i + 16, _mm256_mul_ps(c, s));
    _mm256_storeu_ps(y + i + 24, _mm256_mul_ps(d, s));
  }
  for (; i < n; ++i) {
    float sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += scores[t] * static_cast<float>(v[t * n + i]);
    y[i] = sum * share;
  }
}

// Reads the tensors that Python lists for each layer, in this order.
struct Reader {
  at::TensorList tensors;
  at::IntArrayRef sizes;  // rows and columns of each weight
  size_t tensor = 0, size = 0;

  const Tensor& next() { return tensors[tensor++]; }
  Weight weight() {
    const Tensor& held = next();
    const Tensor& grid = next();
    const Tensor& bias = next();
    const int64_t rows = sizes[size++], columns = sizes[size++];
    Weight w;
    if (grid.numel()) {
      w = weight_of(held, grid, rows, columns);
    } else {
      TORCH_CHECK(held.is_contiguous() && held.numel() == rows * columns, "a dense weight's shape");
      w.rows = rows;
      w.columns = columns;
      w.dense = held;
    }
    if (bias.numel()) {
      TORCH_CHECK(bias.is_contiguous() && bias.numel() == rows, "a bias's shape");
      w.bias = bias;
    }
    return w;
  }
};

// One token through all layers of a model of Llama's kind, for one sequence.
//
// x [width], its embedding; cos, sin [head size] of its position; cache: per layer
// [2, key heads, room, head size], of which `position` rows are filled and one more is written.
// weights: per layer norm, q, k, v, norm of q, norm of k (empty: none), o, norm, gate, up, down, where
// a matrix is three tensors (codes, grid, bias; or weight, empty, bias); then norm and head.
// Returns the logits [1, 1, vocabulary] in x's dtype; all between is in float32.
Tensor decode(const Tensor& x, const Tensor& cos, const Tensor& sin, at::TensorList weights,
              at::IntArrayRef sizes, at::TensorList cache, int64_t position, int64_t heads,
              double eps, bool vnni) {
  const int64_t width = x.numel(), n = cos.numel();
  TORCH_CHECK(x.is_contiguous() && cos.is_contiguous() && sin.is_contiguous() &&
              sin.numel() == n, "x, cos, sin: contiguous");
  Reader read{weights, sizes};
  std::vector<float> h(width), normed(width), rotation(2 * n), made, kv, joined(heads * n), gated;
  to_floats(x, h.data());
  to_floats(cos, rotation.data());
  to_floats(sin, rotation.data() + n);
  Input input;
  const float factor = 1.0f / std::sqrt(static_cast<float>(n));
  const auto add = [&](const std::vector<float>& y) {
    for (int64_t i = 0; i < width; ++i) h[i] += y[i];
  };
  for (const Tensor& held : cache) {
    TORCH_CHECK(held.dim() == 4 && held.is_contiguous() && held.size(0) == 2 &&
                held.size(2) > position && held.size(3) == n, "cache: no room");
    const int64_t pairs = held.size(1), room = held.size(2);
    normalize(h.data(), read.next(), width, eps, normed.data());
    const Weight q = read.weight(), k = read.weight(), v = read.weight();
    const Tensor& q_norm = read.next();
    const Tensor& k_norm = read.next();
    TORCH_CHECK(q.rows == heads * n && k.rows == pairs * n && v.rows == pairs * n, "heads");
    made.resize(q.rows);
    kv.resize(2 * pairs * n);
    input.set(normed.data(), width);
    products({{&q, made.data()}, {&k, kv.data()}, {&v, kv.data() + pairs * n}}, input, vnni);
    for (int64_t i = 0; i < heads + pairs; ++i) {
      float* head = i < heads ? made.data() + i * n : kv.data() + (i - heads) * n;
      const Tensor& norm = i < heads ? q_norm : k_norm;
      if (norm.numel()) normalize(head, norm, n, eps, head);
      rotate(head, rotation.data(), rotation.data() + n, n);
    }
    with_type(held, [&](auto* p) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
      T* out = held.mutable_data_ptr<T>();
      for (int64_t i = 0; i < 2 * pairs; ++i)
        for (int64_t j = 0; j < n; ++j)
          out[(i * room + position) * n + j] = static_cast<T>(kv[i * n + j]);
      const int64_t grain = std::max<int64_t>(1, GRAIN / (2 * n * (position + 1)));
      at::parallel_for(0, heads, grain, [&](int64_t from, int64_t to) {
        std::vector<float> scores(position + 1 + 8);
        for (int64_t i = from; i < to; ++i) {
          const T* keys = p + i / (heads / pairs) * room * n;
          attend(made.data() + i * n, keys, keys + pairs * room * n, position + 1, n, factor,
                 scores.data(), joined.data() + i * n);
        }
      });
    });
    const Weight o = read.weight();
    input.set(joined.data(), heads * n);
    products({{&o, normed.data()}}, input, vnni);
    add(normed);
    normalize(h.data(), read.next(), width, eps, normed.data());
    const Weight gate = read.weight(), up = read.weight(), down = read.weight();
    gated.resize(gate.rows);
    input.set(normed.data(), width);
    input.forms.reserve(2);
    const Quantized& for_gate = input.of(gate);
    const Quantized& for_up = input.of(up);
    at::parallel_for(0, blocks_of(gate), std::max<int64_t>(1, GRAIN / (2 * LANES * width)),
                     [&](int64_t from, int64_t to) {
      gated_range(gate, up, for_gate, for_up, normed.data(), gated.data(), from, to, vnni);
    });
    input.set(gated.data(), gate.rows);
    products({{&down, normed.data()}}, input, vnni);
    add(normed);
  }
  normalize(h.data(), read.next(), width, eps, normed.data());
  const Weight head = read.weight();
  made.resize(head.rows);
  input.set(normed.data(), width);
  products({{&head, made.data()}}, input, vnni);
  Tensor logits = at::empty({1, 1, head.rows}, x.options());
  with_type(logits, [&](auto* p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    T* out = logits.mutable_data_ptr<T>();
    for (int64_t i = 0; i < head.rows; ++i) out[i] = static_cast<T>(made[i]);
  });
  return logits;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace

TORCH_LIBRARY(stillhouse_cpu, m) {
  m.def("has_avx2() -> bool", &has_avx2);
  m.def("has_vnni() -> bool", &has_vnni);
  m.def("product(Tensor x, Tensor codes, Tensor grid, SymInt rows, bool vnni) -> Tensor");
  m.def("dequantize(Tensor like, Tensor codes, Tensor grid, SymInt rows, SymInt columns) -> Tensor");
  m.def(
      "decode(Tensor x, Tensor cos, Tensor sin, Tensor[] weights, int[] sizes, Tensor(a!)[] cache, "
      "int position, int heads, float eps, bool vnni) -> Tensor");
}

TORCH_LIBRARY_IMPL(stillhouse_cpu, CPU, m) {
  m.impl("product", &product);
  m.impl("dequantize", &dequantize);
  m.impl("decode", &decode);
}

TORCH_LIBRARY_IMPL(stillhouse_cpu, Meta, m) {
  m.impl("product", &product_shape);
  m.impl("dequantize", &dequantize_shape);
}
