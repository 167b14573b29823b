// Drawing actions from the diffusion policy (in float32 or, by bfloat16.hpp, in bfloat16), ranking
// them by the critics, and the forward and backward pass of a network that is fitted, on a CPU.
//
// The same mathematics as sampler.py and networks.py, which document it; native.py builds this file,
// native.py and fit.py call it.
// What is gained: weights are packed so that a product reads them in order, Mish is applied to sums
// that are still in registers, and a block of rows takes all T steps while it and the weights stay
// in the second-level cache. Every row is computed by itself, in the same order of additions
// whatever rows are beside it, so that neither the batch nor the number of threads changes a bit.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// Accumulators of a block (ROWS x COLUMNS vectors) must fit the registers beside a row of weights.
#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, COLUMNS = 4;
#else
constexpr int LANES = 8, COLUMNS = 2;
#endif
constexpr int ROWS = 6;
// Columns of a panel of the weights.
constexpr int PANEL = COLUMNS * LANES;
// Rows that go through the networks together, at most; a multiple of ROWS.
constexpr int BLOCK_ROWS = 96;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
// The same in memory, where it begins at any number.
typedef float Stored __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

struct Layer {
    int64_t in, out;      // features; `out` is padded to a multiple of LANES with zeros
    const float *weight;  // panels of up to COLUMNS vectors, each [in, vectors * LANES]
    const float *bias;    // [out], or null
    // Of layer normalisation, or null: each [out], padded with zeros; `units` are those of `out` that
    // are no padding.
    const float *scale, *shift;
    int64_t units;
};

// A layer of which `qvpo_pack` makes a `Layer`.
struct Source {
    enum Form : int64_t { WIDE, NARROW, TRANSPOSED };
    int64_t in, out, padded_in;
    const float *weight;  // [out, in]
    int64_t stride;       // of its rows
    const float *bias, *scale, *shift;  // [out], or null
    int64_t form;
};

struct Network {
    int64_t num_layers;      // behind the first one
    const Layer *observation;  // the first layer's part that meets the observation, with its bias
    const Layer *action;       // its part that meets the action, without
    const Layer *layers;
    // Of the action's part and of each of `layers`, the transposed weight: [out, in]. Or null.
    const Layer *transposed;
};

namespace {

// By a cast: for `memcpy` GCC 12 takes two half loads and two half stores on AVX2, eight times slower.
Vector load(const float *from) { return *reinterpret_cast<const Stored *>(from); }

void store(float *to, Vector v) { *reinterpret_cast<Stored *>(to) = v; }

Vector broadcast(float x) { return x - Vector{}; }

// sum + x * y with one rounding, where the machine can. Tuned for AMD's processors, GCC makes one
// operation of the plain expression in loops over several sums, but two in a loop over a single one.
Vector add_product(Vector sum, Vector x, Vector y) {
#if defined(__FP_FAST_FMAF)
    for (int lane = 0; lane < LANES; ++lane)
        sum[lane] = __builtin_fmaf(x[lane], y[lane], sum[lane]);
    return sum;
#else
    return sum + x * y;
#endif
}

// e to the x for -87 < x <= 20, to about one unit in the last place.
Vector exponential(Vector x) {
    // Adding 1.5 * 2^23 rounds to an integer.
    const float rounder = 12582912.0f;
    const Vector shifted = x * 1.44269504f + rounder;
    const Vector n = shifted - rounder;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * reinterpret_cast<Vector>(exponent);  // the same bits
}

// x * m / (m + 2) with m = e^2 + 2e, e = exp(x): see kernels.py.
Vector mish(Vector x) {
    // Far below zero it is zero, from 20 on it is x. The comparisons leave a NaN what it is.
    const Vector lowest = broadcast(-87.0f), highest = broadcast(20.0f);
    x = x < lowest ? lowest : x;
    const Vector e = exponential(x < highest ? x : highest);
    const Vector m = e * (e + 2.0f);
    return x * (m / (m + 2.0f));
}

// The same, and its derivative m / (m + 2) + 4x e (e + 1) / (m + 2)^2.
Vector mish_and_slope(Vector x, Vector &slope) {
    const Vector lowest = broadcast(-87.0f), highest = broadcast(20.0f);
    x = x < lowest ? lowest : x;
    const Vector low = x < highest ? x : highest;
    const Vector e = exponential(low);
    const Vector m = e * (e + 2.0f), r = 1.0f / (m + 2.0f);
    slope = m * r + low * (4.0f * e * r) * ((e + 1.0f) * r);
    return x * (m * r);
}

// Adds the products of R rows of the input and a panel of the weights.
template <int R, int C>
__attribute__((always_inline)) inline void accumulate(Vector (&sums)[R][C], const float *x,
                                                      int64_t x_stride, const float *panel,
                                                      int64_t in) {
    for (int64_t i = 0; i < in; ++i) {
        Vector weights[C];
        for (int c = 0; c < C; ++c) weights[c] = load(panel + (i * C + c) * LANES);
        for (int r = 0; r < R; ++r) {
            const Vector value = broadcast(x[r * x_stride + i]);
            if constexpr (R * C == 1)
                sums[0][0] = add_product(sums[0][0], value, weights[0]);
            else
                for (int c = 0; c < C; ++c) sums[r][c] += value * weights[c];
        }
    }
}

int64_t inputs_of(const Layer &layer, float) { return layer.in; }

template <bool ACTIVATE>
void put(float *to, Vector sum) {
    store(to, ACTIVATE ? mish(sum) : sum);
}

}  // namespace

#include "bfloat16.hpp"

namespace {

int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// A block of sums: R rows of the input times a panel of the weights, onto what `start` holds.
template <int R, int C, bool ACTIVATE, typename In, typename Out>
void multiply(const In *x, int64_t x_stride, const In *panel, int64_t in,
              const float *const *start, const float *bias, Out *out, int64_t out_stride) {
    Vector sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            sums[r][c] = start ? load(start[r] + c * LANES) : Vector{};
            if (bias) sums[r][c] += load(bias + c * LANES);
        }
    accumulate(sums, x, x_stride, panel, in);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) put<ACTIVATE>(out + r * out_stride + c * LANES, sums[r][c]);
}

template <int C, bool ACTIVATE, typename In, typename Out>
void multiply_rows(int64_t rows, const In *x, int64_t x_stride, const In *panel, int64_t in,
                   const float *const *start, int64_t column, const float *bias, Out *out,
                   int64_t out_stride) {
    const float *starts[ROWS];
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t now = std::min<int64_t>(ROWS, rows - row);
        if (start)
            for (int64_t r = 0; r < now; ++r) starts[r] = start[row + r] + column;
        const float *const *from = start ? starts : nullptr;
        const In *in_rows = x + row * x_stride;
        Out *out_rows = out + row * out_stride;
        switch (now) {
#define CASE(R)                                                                                  \
    case R:                                                                                      \
        multiply<R, C, ACTIVATE>(in_rows, x_stride, panel, in, from, bias, out_rows, out_stride); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
        }
    }
}

// out[r] = activation(start[r] + bias + x[r] W) for `rows` rows; `start` may be null. `In` is the
// type of the weights too.
template <bool ACTIVATE, typename In, typename Out>
void apply(const Layer &layer, int64_t rows, const In *x, int64_t x_stride,
           const float *const *start, Out *out, int64_t out_stride) {
    const int64_t in = inputs_of(layer, In{});
    for (int64_t column = 0; column < layer.out;) {
        const int64_t vectors = std::min<int64_t>(COLUMNS, (layer.out - column) / LANES);
        const In *panel = reinterpret_cast<const In *>(layer.weight) + column * in;
        const float *bias = layer.bias ? layer.bias + column : nullptr;
        Out *to = out + column;
        switch (vectors) {
#define CASE(C)                                                                                 \
    case C:                                                                                     \
        multiply_rows<C, ACTIVATE>(rows, x, x_stride, panel, in, start, column, bias, to,       \
                                   out_stride);                                                 \
        break;
            CASE(1) CASE(2)
#if !defined(__AVX512F__) && !defined(__aarch64__)
        }
#else
            CASE(3) CASE(4)
        }
#endif
#undef CASE
        column += vectors * LANES;
    }
}

float total(Vector sum) {
    float all = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) all += sum[lane];
    return all;
}

// A row of `units` sums and padding that is zero -> the row less its mean, over its deviation as
// torch.nn.LayerNorm has it; the padding stays zero. Returns one over the deviation.
float normalize(float *row, int64_t units) {
    const int64_t width = padded(units);
    Vector sum{}, squares{};
    for (int64_t j = 0; j < width; j += LANES) sum += load(row + j);
    const float mean = total(sum) / units;
    for (int64_t j = 0; j < width; j += LANES) store(row + j, load(row + j) - mean);
    std::fill(row + units, row + width, 0.0f);
    for (int64_t j = 0; j < width; j += LANES) squares += load(row + j) * load(row + j);
    const float factor = 1.0f / std::sqrt(total(squares) / units + 1e-5f);
    for (int64_t j = 0; j < width; j += LANES) store(row + j, load(row + j) * factor);
    return factor;
}

// The gradient of the normalised row -> that of the row before.
void normalize_backward(float *gradient, const float *normalized, float factor, int64_t units) {
    const int64_t width = padded(units);
    Vector sum{}, along{};
    for (int64_t j = 0; j < width; j += LANES) {
        sum += load(gradient + j);
        along += load(gradient + j) * load(normalized + j);
    }
    const float mean = total(sum) / units, slope = total(along) / units;
    for (int64_t j = 0; j < width; j += LANES)
        store(gradient + j, (load(gradient + j) - mean - load(normalized + j) * slope) * factor);
}

// A row of sums -> Mish of them, normalised over the units.
void normalize_and_activate(const Layer &layer, float *row) {
    normalize(row, layer.units);
    for (int64_t j = 0; j < layer.out; j += LANES)
        store(row + j, mish(load(row + j) * load(layer.scale + j) + load(layer.shift + j)));
}

// A hidden layer's activations.
void hidden_layer(const Layer &layer, int64_t rows, const float *x, int64_t x_stride,
                  const float *const *start, float *out, int64_t out_stride) {
    if (!layer.scale) return apply<true>(layer, rows, x, x_stride, start, out, out_stride);
    apply<false>(layer, rows, x, x_stride, start, out, out_stride);
    for (int64_t r = 0; r < rows; ++r) normalize_and_activate(layer, out + r * out_stride);
}

int64_t widest(const Network &network) {
    int64_t width = network.observation->out;
    for (int64_t i = 0; i < network.num_layers; ++i)
        width = std::max(width, network.layers[i].out);
    return width;
}

// Rows (samples of states) that go through the networks together, and the states that they are of.
struct Block {
    int64_t row, rows, state, states;
    Block(int64_t first, int64_t number, int64_t samples)
        : row(first),
          rows(number),
          state(first / samples),
          states((first + number - 1) / samples - state + 1) {}
};

// One thread's working memory.
struct Scratch {
    int64_t width, hidden;
    std::vector<float> one, other;
    std::vector<uint16_t> narrow_actions, narrow_one, narrow_other;  // of `run_narrow`
    std::vector<float> first;  // of each state of a block, the first layer but the action's part
    std::vector<const float *> start;  // of each row, its state's part of `first`
    explicit Scratch(const Network &network)
        : width(widest(network)),
          hidden(network.observation->out),
          one(BLOCK_ROWS * width),
          other(BLOCK_ROWS * width),
          first((BLOCK_ROWS + 1) * hidden),
          start(BLOCK_ROWS) {}

    void point_at_states(const Block &block, int64_t samples) {
        for (int64_t r = 0; r < block.rows; ++r)
            start[r] = first.data() + ((block.row + r) / samples - block.state) * hidden;
    }

    // The network from where the action comes in; returns the output, [rows, width].
    const float *run(const Network &network, int64_t rows, const float *actions,
                     int64_t action_stride) {
        hidden_layer(*network.action, rows, actions, action_stride, start.data(), one.data(),
                     width);
        float *from = one.data(), *to = other.data();
        for (int64_t i = 0; i < network.num_layers; ++i) {
            if (i + 1 < network.num_layers)
                hidden_layer(network.layers[i], rows, from, width, nullptr, to, width);
            else
                apply<false>(network.layers[i], rows, from, width, nullptr, to, width);
            std::swap(from, to);
        }
        return from;
    }

    // The same in bfloat16, of which `width` is a multiple of two.
    const float *run_narrow(const Network &network, int64_t rows, const float *actions,
                            int64_t action_stride) {
        const int64_t act_dim = network.action->in, action_width = even(act_dim);
        narrow_actions.resize(BLOCK_ROWS * action_width);
        narrow_one.resize(BLOCK_ROWS * width);
        narrow_other.resize(BLOCK_ROWS * width);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t a = 0; a < act_dim; ++a)
                narrow_actions[r * action_width + a] = narrowed(actions[r * action_stride + a]);
        apply<true>(*network.action, rows, narrow_actions.data(), action_width, start.data(),
                    narrow_one.data(), width);
        for (int64_t i = 0; i + 1 < network.num_layers; ++i) {
            apply<true>(network.layers[i], rows, narrow_one.data(), width, nullptr,
                        narrow_other.data(), width);
            narrow_one.swap(narrow_other);
        }
        apply<false>(network.layers[network.num_layers - 1], rows, narrow_one.data(), width,
                     nullptr, one.data(), width);
        return one.data();
    }
};

// The mean of the `kept` lowest of `count` values, which change their order; a NaN among all wins.
float mean_of_lowest(float *values, int64_t count, int64_t kept) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] != values[i]) return values[i];
    std::nth_element(values, values + kept - 1, values + count);
    float sum = 0.0f;
    for (int64_t i = 0; i < kept; ++i) sum += values[i];
    return sum / kept;
}

// To [-1, 1]; a NaN stays one.
float clipped(float x) { return x > 1.0f ? 1.0f : x < -1.0f ? -1.0f : x; }

// Working memory, which the calling thread keeps for its next call: fresh pages of the system would
// cost about as much as the arithmetic. It holds what the last call left. One at a time in a thread.
class Memory {
    float *next;

   public:
    explicit Memory(int64_t numbers) {
        thread_local std::vector<float> kept;
        if (int64_t(kept.size()) < numbers) kept = std::vector<float>(numbers);
        next = kept.data();
    }

    float *take(int64_t numbers) {
        next += numbers;
        return next - numbers;
    }
};

struct Range {
    int64_t begin, end;
};

// Where threads wait for one another. They spin at first: to be woken takes longer than most waits.
class Barrier {
    const int64_t count;
    std::atomic<int64_t> missing, round{0};

   public:
    explicit Barrier(int64_t threads) : count(threads), missing(threads) {}

    void wait() {
        const int64_t now = round;
        if (--missing == 0) {
            missing = count;
            ++round;
        }
        for (int spins = 0; round == now;)
            if (spins < 1000)
                ++spins;
            else
                std::this_thread::yield();
    }
};

// One of the threads that do a piece of work together.
struct Member {
    int64_t index, count;
    Barrier &barrier;

    // Its part of [0, total), which begins at a multiple of `unit`.
    Range part(int64_t total, int64_t unit = 1) const {
        const int64_t units = (total + unit - 1) / unit;
        return {std::min(total, (units * index / count) * unit),
                std::min(total, (units * (index + 1) / count) * unit)};
    }

    // Its part of the rows, in blocks.
    template <typename Work>
    void blocks(int64_t all_rows, int64_t samples, Work work) const {
        const Range rows = part(all_rows, ROWS);
        for (int64_t row = rows.begin; row < rows.end; row += BLOCK_ROWS)
            work(Block(row, std::min<int64_t>(BLOCK_ROWS, rows.end - row), samples));
    }

    // Returns when all have come here, and sees what they wrote before.
    void wait() const { barrier.wait(); }
};

// How many of `threads` so many rows are worth.
int64_t worth(int64_t threads, int64_t rows) {
    const int64_t least = 4 * ROWS;  // of each: a thread is to do more than to start
    return std::max<int64_t>(1, std::min(threads, rows / least));
}

// Every member does `work`.
template <typename Work>
void in_parallel(int64_t threads, Work work) {
    Barrier barrier(threads);
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i)
        others.emplace_back([&, i] { work(Member{i, threads, barrier}); });
    work(Member{0, threads, barrier});
    for (auto &thread : others) thread.join();
}

// [in, out] with rows one after another -> the panels of `Layer::weight`, `out` padded with zeros.
void pack_rows(const float *from, int64_t stride, int64_t in, int64_t out, float *panel) {
    for (int64_t column = 0; column < out; column += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, padded(out) - column);
        const int64_t columns = std::min(width, out - column);
        for (int64_t i = 0; i < in; ++i, panel += width)
            std::fill(std::copy_n(from + i * stride + column, columns, panel), panel + width, 0.0f);
    }
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// [4, 4] of row stride `stride` -> its transpose, of row stride `to_stride`.
void transpose_tile(const float *from, int64_t stride, float *to, int64_t to_stride) {
    Four r[4];
    for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Four *>(from + i * stride);
    // Each takes numbers of two vectors, which is one operation.
    const Four a = {r[0][0], r[1][0], r[0][1], r[1][1]}, b = {r[2][0], r[3][0], r[2][1], r[3][1]};
    const Four c = {r[0][2], r[1][2], r[0][3], r[1][3]}, d = {r[2][2], r[3][2], r[2][3], r[3][3]};
    const Four columns[] = {{a[0], a[1], b[0], b[1]}, {a[2], a[3], b[2], b[3]},
                            {c[0], c[1], d[0], d[1]}, {c[2], c[3], d[2], d[3]}};
    for (int i = 0; i < 4; ++i) *reinterpret_cast<Four *>(to + i * to_stride) = columns[i];
}

// [rows, columns] of row stride `stride` -> [columns, rows] of row stride `to_stride`.
void transpose(const float *from, int64_t stride, int64_t rows, int64_t columns, float *to,
               int64_t to_stride) {
    // A few columns at a time, lest every number be on a cache line of its own.
    for (int64_t begin = 0; begin < columns; begin += 16)
        for (int64_t r = 0; r < rows; r += 4)
            for (int64_t c = begin; c < std::min(begin + 16, columns); c += 4) {
                if (r + 4 <= rows && c + 4 <= columns) {
                    transpose_tile(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
                    continue;
                }
                for (int64_t i = r; i < std::min(r + 4, rows); ++i)
                    for (int64_t j = c; j < std::min(c + 4, columns); ++j)
                        to[j * to_stride + i] = from[i * stride + j];
            }
}

// [out, in] with row stride `stride` -> the panels of `Layer::weight`, with zeros up to
// [padded_out, padded_in], which are Layer::out and Layer::in.
void pack_weight(const float *weight, int64_t stride, int64_t out, int64_t in, int64_t padded_out,
                 int64_t padded_in, float *packed) {
    if (padded_out > out || padded_in > in) std::fill(packed, packed + padded_out * padded_in, 0.0f);
    for (int64_t column = 0; column < padded_out; column += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, padded_out - column);
        transpose(weight + column * stride, stride, std::min(width, out - column), in,
                  packed + column * padded_in, width);
    }
}

// The same in bfloat16, for bfloat16.hpp's layers.
void pack_pairs(const float *weight, int64_t stride, int64_t out, int64_t in, int64_t padded_out,
                int64_t padded_in, uint16_t *packed) {
    const int64_t all_in = even(padded_in);
    std::fill(packed, packed + padded_out * all_in, uint16_t(0));
    for (int64_t column = 0; column < padded_out;) {
        const int64_t width = std::min<int64_t>(PANEL, padded_out - column);
        uint16_t *panel = packed + column * all_in;
        const int64_t columns = std::min(width, out - column);
        for (int64_t j = 0; j < columns; j += 16)
            for (int64_t begin = 0; begin < in; begin += 16) {
                uint16_t tile[16][16];
                const int64_t outputs = std::min<int64_t>(16, columns - j);
                const int64_t inputs = std::min<int64_t>(16, in - begin);
                for (int64_t o = 0; o < outputs; ++o)
                    for (int64_t i = 0; i < inputs; ++i)
                        tile[i][o] = narrowed(weight[(column + j + o) * stride + begin + i]);
                for (int64_t i = 0; i < inputs; ++i)
                    for (int64_t o = 0; o < outputs; ++o)
                        panel[((begin + i) / 2 * width + j + o) * 2 + i % 2] = tile[i][o];
            }
        column += width;
    }
}

// `number` values, then zeros up to `padded_number`.
void pad(const float *values, int64_t number, int64_t padded_number, float *to) {
    std::fill(std::copy_n(values, number, to), to + padded_number, 0.0f);
}

// A row of a hidden layer's sums, which it overwrites -> Mish and its slope; with layer normalisation,
// also the normalised sums. Returns one over their deviation, or one.
float activate(const Layer &layer, float *sums, float *activation, float *slopes,
               float *normalized) {
    float factor = 1.0f;
    if (layer.scale) {
        factor = normalize(sums, layer.units);
        std::copy_n(sums, layer.out, normalized);
    }
    for (int64_t j = 0; j < layer.out; j += LANES) {
        Vector sum = load(sums + j), slope;
        if (layer.scale) sum = sum * load(layer.scale + j) + load(layer.shift + j);
        store(activation + j, mish_and_slope(sum, slope));
        store(slopes + j, slope);
    }
    return factor;
}

// A network's forward pass for a block of rows, and the way back from its output to the action.
struct Pass {
    const Network &network;
    int64_t width;
    std::vector<float> one, other;
    // Of each hidden layer, [hidden layers, BLOCK_ROWS, width]: the slopes of Mish and, where it has
    // layer normalisation, the normalised sums; one over each row's deviation.
    std::vector<float> slopes, normalized, factors;
    explicit Pass(const Network &whole)
        : network(whole),
          width(std::max(widest(whole), whole.transposed->out)),
          one(BLOCK_ROWS * width),
          other(BLOCK_ROWS * width),
          slopes(whole.num_layers * BLOCK_ROWS * width),
          normalized(slopes.size()),
          factors(whole.num_layers * BLOCK_ROWS) {}

    const Layer &hidden(int64_t index) const {
        return index ? network.layers[index - 1] : *network.action;
    }

    // first [rows, hidden units], what the observation adds to the first layer's sums
    // -> the output, [rows, width].
    float *forward(int64_t rows, const float *first, const float *actions, int64_t act_dim) {
        const float *starts[BLOCK_ROWS];
        for (int64_t r = 0; r < rows; ++r) starts[r] = first + r * network.action->out;
        for (int64_t index = 0; index < network.num_layers; ++index) {
            if (index)
                apply<false>(hidden(index), rows, one.data(), width, nullptr, other.data(), width);
            else
                apply<false>(hidden(0), rows, actions, act_dim, starts, other.data(), width);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = index * BLOCK_ROWS + r;
                float *row = other.data() + r * width;
                factors[at] = activate(hidden(index), row, row, slopes.data() + at * width,
                                       normalized.data() + at * width);
            }
            one.swap(other);
        }
        apply<false>(hidden(network.num_layers), rows, one.data(), width, nullptr, other.data(),
                     width);
        return other.data();
    }

    // The gradient of the output [rows, width], which is overwritten -> that of the action.
    const float *backward(int64_t rows, float *gradient) {
        float *to = one.data();
        for (int64_t index = network.num_layers; index > 0; --index) {
            apply<false>(network.transposed[index], rows, gradient, width, nullptr, to, width);
            const Layer &layer = hidden(index - 1);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (index - 1) * BLOCK_ROWS + r;
                float *row = to + r * width;
                for (int64_t j = 0; j < layer.out; j += LANES) {
                    Vector slope = load(slopes.data() + at * width + j);
                    if (layer.scale) slope = slope * load(layer.scale + j);
                    store(row + j, load(row + j) * slope);
                }
                if (layer.scale)
                    normalize_backward(row, normalized.data() + at * width, factors[at], layer.units);
            }
            std::swap(gradient, to);
        }
        apply<false>(network.transposed[0], rows, gradient, width, nullptr, to, width);
        return to;
    }
};

// A row's outputs of both twins [2][outputs] -> in their place the gradient of the mean of the `kept`
// lowest. A NaN among them makes all of it NaN.
void gradient_of_lowest(float *(&twins)[2], int64_t outputs, int64_t kept,
                        std::vector<float> &pool) {
    pool.resize(2 * outputs);
    for (int twin = 0; twin < 2; ++twin)
        std::copy_n(twins[twin], outputs, pool.data() + twin * outputs);
    float share = 1.0f / kept;
    for (float value : pool)
        if (value != value) share = value;
    if (share == share) std::nth_element(pool.begin(), pool.begin() + kept - 1, pool.end());
    const float highest = pool[kept - 1];
    // Of those that are equal to the highest kept one, the first count.
    int64_t equal = kept - std::count_if(pool.begin(), pool.begin() + kept,
                                         [&](float value) { return value < highest; });
    for (float *values : twins)
        for (int64_t i = 0; i < outputs; ++i) {
            const bool counts = values[i] < highest || (values[i] == highest && equal-- > 0);
            values[i] = counts || share != share ? share : 0.0f;
        }
}

}  // namespace

// A layer of a network that is fitted; all arrays are contiguous.
struct FittedLayer {
    int64_t in, out;
    const float *weight, *bias;  // [out, in], [out]
    // Written by the backward pass: gradients of weight and bias.
    float *weight_gradient, *bias_gradient;
    // Of a hidden layer, written by the forward pass for the other: Mish of the sum, and the slope
    // there. [rows, out padded to a multiple of LANES]
    float *activation, *slope;
    // Of a hidden layer with layer normalisation, else null: its parameters and their gradients, [out],
    // and, written by the forward pass, the normalised sums [rows, out padded] and one over the
    // deviation of each row.
    const float *scale, *shift;
    float *scale_gradient, *shift_gradient, *normalized, *factor;
};

namespace {

// A copy of a `FittedLayer`'s parameters, in the order in which a product reads them.
struct PackedLayer {
    const FittedLayer &from;
    int64_t out;  // padded
    float *weight, *bias, *scale, *shift;

    static int64_t size(const FittedLayer &from) { return (from.in + 3) * padded(from.out); }

    PackedLayer(const FittedLayer &layer, Memory &memory)
        : from(layer),
          out(padded(layer.out)),
          weight(memory.take(layer.in * out)),
          bias(memory.take(out)),
          scale(memory.take(out)),
          shift(memory.take(out)) {}

    // Those of the units in `part`, which are whole panels.
    void pack(Range part) {
        const int64_t begin = part.begin, number = part.end - begin;
        const int64_t given = std::min(part.end, from.out) - begin;
        if (given <= 0) return;
        pack_weight(from.weight + begin * from.in, from.in, given, from.in, number, from.in,
                    weight + begin * from.in);
        pad(from.bias + begin, given, number, bias + begin);
        if (!from.scale) return;
        pad(from.scale + begin, given, number, scale + begin);
        pad(from.shift + begin, given, number, shift + begin);
    }

    Layer layer() const {
        return {from.in, out, weight, bias, from.scale ? scale : nullptr,
                from.scale ? shift : nullptr, from.out};
    }
};

// to[j] = the sum over r of from[r, j], times `times` [r, j] where it is given, for j in `columns`.
void sum_of_rows(const float *from, int64_t stride, int64_t rows, Range columns, float *to,
                 const float *times = nullptr) {
    std::fill(to + columns.begin, to + columns.end, 0.0f);
    for (int64_t r = 0; r < rows; ++r, from += stride)
        for (int64_t j = columns.begin; j < columns.end; ++j)
            to[j] += times ? from[j] * times[r * stride + j] : from[j];
}

}  // namespace

extern "C" {

int64_t qvpo_lanes() { return LANES; }

// Whether bfloat16 is faster than float32 here.
int64_t qvpo_multiplies_bfloat16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// Packs the layers that `sources` describe, in the same order. Returns how many numbers `memory` must
// have room for; writes nothing if it is null.
int64_t qvpo_pack(const Source *sources, int64_t number, float *memory, Layer *layers) {
    int64_t taken = 0;
    const auto take = [&](int64_t numbers) {
        taken += numbers;
        return memory ? memory + taken - numbers : nullptr;
    };
    for (int64_t i = 0; i < number; ++i) {
        const Source &from = sources[i];
        const bool turned = from.form == Source::TRANSPOSED;
        const int64_t in = turned ? from.out : from.padded_in;
        const int64_t out = padded(turned ? from.in : from.out);
        float *const weight = take(out * even(in));
        const auto kept = [&](const float *values) {
            float *const to = values ? take(out) : nullptr;
            if (to) pad(values, from.out, out, to);
            return to;
        };
        const Layer layer{in, out, weight, kept(from.bias), kept(from.scale), kept(from.shift),
                          from.out};
        if (!memory) continue;
        layers[i] = layer;
        if (turned)
            pack_rows(from.weight, from.stride, in, from.in, weight);
        else if (from.form == Source::NARROW)
            pack_pairs(from.weight, from.stride, from.out, from.in, out, in,
                       reinterpret_cast<uint16_t *>(weight));
        else
            pack_weight(from.weight, from.stride, from.out, from.in, out, in, weight);
    }
    return taken;
}

// The reverse process: sampler.sample_actions.
//   step_parts  [T, H]  each step's share of the first layer, in the order of the chain
//   constants   [T, 5]  rows of NoiseSchedule.reverse_steps, in the same order
//   noise       [T, S, N, A]
//   actions     [S, N, A], written
//   narrow      whether what is behind the observation's part is bfloat16, packed as such
void qvpo_sample(const Network *actor, int64_t steps, const float *step_parts,
                 const float *constants, const float *obs, int64_t obs_dim, const float *noise,
                 int64_t states, int64_t samples, int64_t act_dim, float *actions,
                 int64_t narrow, int64_t threads) {
    const int64_t hidden = actor->observation->out;
    std::vector<float> obs_parts(states * hidden);
    const int64_t all_rows = states * samples;
    in_parallel(worth(threads, all_rows), [&](const Member &member) {
        const Range mine = member.part(states, ROWS);
        apply<false>(*actor->observation, mine.end - mine.begin, obs + mine.begin * obs_dim,
                     obs_dim, nullptr, obs_parts.data() + mine.begin * hidden, hidden);
        member.wait();
        Scratch scratch(*actor);
        member.blocks(all_rows, samples, [&](const Block &block) {
            scratch.point_at_states(block, samples);
            const int64_t numbers = block.rows * act_dim;
            float *x = actions + block.row * act_dim;
            std::memcpy(x, noise + block.row * act_dim, numbers * sizeof(float));
            for (int64_t step = 0; step < steps; ++step) {
                const float *part = step_parts + step * hidden;
                for (int64_t s = 0; s < block.states; ++s) {
                    const float *from = obs_parts.data() + (block.state + s) * hidden;
                    for (int64_t j = 0; j < hidden; ++j)
                        scratch.first[s * hidden + j] = part[j] + from[j];
                }
                const float *predicted = narrow
                                             ? scratch.run_narrow(*actor, block.rows, x, act_dim)
                                             : scratch.run(*actor, block.rows, x, act_dim);
                const float *c = constants + step * 5;
                // The last step adds no noise: its sigma is zero, any noise will do.
                const int64_t slice = step + 1 < steps ? step + 1 : 0;
                const float *z = noise + (slice * all_rows + block.row) * act_dim;
                for (int64_t r = 0; r < block.rows; ++r)
                    for (int64_t a = 0; a < act_dim; ++a) {
                        float &value = x[r * act_dim + a];
                        const float x0 = c[0] * value - c[1] * predicted[r * scratch.width + a];
                        value = c[2] * clipped(x0) + c[3] * value + c[4] * z[r * act_dim + a];
                    }
            }
            for (int64_t i = 0; i < numbers; ++i) x[i] = clipped(x[i]);
        });
    });
}

// The mean of the `kept` lowest of the twins' outputs, for kept = 1 the lower of their estimates:
// sampler.min_q. actions [S, N, A] -> q [S, N].
void qvpo_min_q(const Network *twins, int64_t outputs, int64_t kept, const float *obs,
                int64_t obs_dim, const float *actions, int64_t states, int64_t samples,
                int64_t act_dim, float *q, int64_t threads) {
    const int64_t all_rows = states * samples;
    in_parallel(worth(threads, all_rows), [&](const Member &member) {
        Scratch scratch(*twins);
        std::vector<float> pools(kept == 1 ? 0 : BLOCK_ROWS * 2 * outputs);  // of each row, both
        member.blocks(all_rows, samples, [&](const Block &block) {
            scratch.point_at_states(block, samples);
            for (int twin = 0; twin < 2; ++twin) {
                apply<false>(*twins[twin].observation, block.states, obs + block.state * obs_dim,
                             obs_dim, nullptr, scratch.first.data(), scratch.hidden);
                const float *out =
                    scratch.run(twins[twin], block.rows, actions + block.row * act_dim, act_dim);
                if (kept != 1) {
                    for (int64_t r = 0; r < block.rows; ++r)
                        std::copy_n(out + r * scratch.width, outputs,
                                    pools.data() + (2 * r + twin) * outputs);
                    continue;
                }
                for (int64_t r = 0; r < block.rows; ++r) {
                    const float value = out[r * scratch.width];
                    float &lowest = q[block.row + r];
                    // A NaN of either wins, as in torch.minimum.
                    if (twin == 0 || value < lowest || value != value) lowest = value;
                }
            }
            for (int64_t r = 0; kept != 1 && r < block.rows; ++r)
                q[block.row + r] =
                    mean_of_lowest(pools.data() + 2 * r * outputs, 2 * outputs, kept);
        });
    });
}

// The gradient of min_q for the action: TwinQ.q_gradient.
//   firsts    [2, R, H]  what the observation adds to the twins' first sums, bias included
//   actions   [R, A]
//   gradient  [R, A], written
void qvpo_q_gradient(const Network *twins, int64_t outputs, int64_t kept, const float *firsts,
                     const float *actions, int64_t rows, int64_t act_dim, float *gradient,
                     int64_t threads) {
    const int64_t hidden = twins->action->out;
    in_parallel(worth(threads, rows), [&](const Member &member) {
        Pass passes[] = {Pass(twins[0]), Pass(twins[1])};
        const int64_t width = passes[0].width;
        std::vector<float> pool;
        member.blocks(rows, 1, [&](const Block &block) {
            float *out[2], *to = gradient + block.row * act_dim;
            for (int twin = 0; twin < 2; ++twin)
                out[twin] = passes[twin].forward(block.rows,
                                                 firsts + (twin * rows + block.row) * hidden,
                                                 actions + block.row * act_dim, act_dim);
            for (int64_t r = 0; r < block.rows; ++r) {
                float *of_row[] = {out[0] + r * width, out[1] + r * width};
                gradient_of_lowest(of_row, outputs, kept, pool);
            }
            const float *found[] = {passes[0].backward(block.rows, out[0]),
                                    passes[1].backward(block.rows, out[1])};
            for (int64_t r = 0; r < block.rows; ++r)
                for (int64_t a = 0; a < act_dim; ++a)
                    to[r * act_dim + a] = found[0][r * width + a] + found[1][r * width + a];
        });
    });
}

// SplitMLP.forward: x [rows, layers[0].in], and `start` [rows, layers[0].out padded], which is added
// to the first layer's sums, or null -> out [rows, outputs].
void qvpo_fit_forward(const FittedLayer *layers, int64_t num_layers, int64_t rows, const float *x,
                      const float *start, float *out, int64_t threads) {
    threads = worth(threads, rows);
    int64_t widest = 0, numbers = 0;
    for (int64_t l = 0; l < num_layers; ++l) {
        widest = std::max(widest, padded(layers[l].out));
        numbers += PackedLayer::size(layers[l]);
    }
    Memory memory(numbers + threads * BLOCK_ROWS * widest);
    std::vector<PackedLayer> packed;
    for (int64_t l = 0; l < num_layers; ++l) packed.emplace_back(layers[l], memory);
    float *const privates = memory.take(threads * BLOCK_ROWS * widest);
    in_parallel(threads, [&](const Member &member) {
        for (PackedLayer &layer : packed) layer.pack(member.part(layer.out, PANEL));
        member.wait();
        float *const sums = privates + member.index * BLOCK_ROWS * widest;
        member.blocks(rows, 1, [&](const Block &block) {
            const float *from = x + block.row * layers[0].in;
            int64_t stride = layers[0].in;
            const float *starts[BLOCK_ROWS];
            for (int64_t r = 0; start && r < block.rows; ++r)
                starts[r] = start + (block.row + r) * packed[0].out;
            for (int64_t l = 0; l < num_layers; ++l) {
                const FittedLayer &layer = layers[l];
                const Layer whole = packed[l].layer();
                const int64_t width = whole.out;
                apply<false>(whole, block.rows, from, stride, l == 0 && start ? starts : nullptr,
                             sums, width);
                for (int64_t r = 0; r < block.rows; ++r) {
                    const int64_t row = block.row + r, at = row * width;
                    float *of_row = sums + r * width;
                    if (l + 1 == num_layers) {
                        std::copy_n(of_row, layer.out, out + row * layer.out);
                        continue;
                    }
                    float *normalized = layer.scale ? layer.normalized + at : nullptr;
                    const float factor = activate(whole, of_row, layer.activation + at,
                                                  layer.slope + at, normalized);
                    if (layer.scale) layer.factor[row] = factor;
                }
                from = layer.activation + block.row * width;
                stride = width;
            }
        });
    });
}

// For the gradient of the output: those of the layers, and that of `start` [rows, layers[0].out
// padded].
void qvpo_fit_backward(const FittedLayer *layers, int64_t num_layers, int64_t rows, const float *x,
                       const float *out_gradient, float *start_gradient, int64_t threads) {
    threads = worth(threads, rows);
    int64_t widest = 0, largest = 0;  // a layer's padded width, and padded numbers of a weight
    for (int64_t l = 0; l < num_layers; ++l) {
        widest = std::max({widest, padded(layers[l].in), padded(layers[l].out)});
        largest = std::max(largest, layers[l].out * padded(layers[l].in));
    }
    const int64_t of_rows = rows * widest, of_block = BLOCK_ROWS * widest;
    Memory memory(6 * of_rows + largest + threads * of_block);
    // Gradients of the sums and, before layer normalisation's backward pass, of its output; in turns,
    // since a layer's are written while those of the layer above are read.
    float *const sums[] = {memory.take(of_rows), memory.take(of_rows)};
    float *const normals[] = {memory.take(of_rows), memory.take(of_rows)};
    // What the products of a layer read, by panels: what came in, and the weight.
    float *const inputs = memory.take(of_rows), *const weight = memory.take(largest);
    float *const transposed = memory.take(of_rows);  // the gradient; a member has its own units
    float *const privates = memory.take(threads * of_block);
    in_parallel(threads, [&](const Member &member) {
        float *const product = privates + member.index * of_block;
        const float *gradient = out_gradient;  // of a layer's sums, [rows, stride]
        int64_t stride = layers[num_layers - 1].out;
        for (int64_t l = num_layers - 1;; --l) {
            const FittedLayer &layer = layers[l];
            const int64_t width = padded(layer.in);
            const Range panels = member.part(width, PANEL);
            const int64_t given = std::min(panels.end, layer.in) - panels.begin;
            if (given > 0) {
                const float *from = (l ? layers[l - 1].activation : x) + panels.begin;
                pack_rows(from, l ? width : layer.in, rows, given, inputs + panels.begin * rows);
                if (l)
                    pack_rows(layer.weight + panels.begin, layer.in, layer.out, given,
                              weight + panels.begin * layer.out);
            }
            member.wait();
            const Range mine = member.part(layer.out, ROWS);
            sum_of_rows(gradient, stride, rows, mine, layer.bias_gradient);
            if (layer.scale) {
                const float *normal = normals[l % 2];
                sum_of_rows(normal, stride, rows, mine, layer.shift_gradient);
                sum_of_rows(normal, stride, rows, mine, layer.scale_gradient, layer.normalized);
            }
            transpose(gradient + mine.begin, stride, rows, mine.end - mine.begin,
                      transposed + mine.begin * rows, rows);
            const Layer by_inputs{rows, width, inputs, nullptr};
            for (int64_t j = mine.begin; j < mine.end; j += BLOCK_ROWS) {
                const int64_t now = std::min<int64_t>(BLOCK_ROWS, mine.end - j);
                apply<false>(by_inputs, now, transposed + j * rows, rows, nullptr, product, width);
                for (int64_t i = 0; i < now; ++i)
                    std::copy_n(product + i * width, layer.in,
                                layer.weight_gradient + (j + i) * layer.in);
            }
            if (l == 0) break;
            const Layer by_weight{layer.out, width, weight, nullptr};
            const FittedLayer &before = layers[l - 1];
            float *to = l == 1 ? start_gradient : sums[(l - 1) % 2];
            member.blocks(rows, 1, [&](const Block &block) {
                apply<false>(by_weight, block.rows, gradient + block.row * stride, stride, nullptr,
                             to + block.row * width, width);
                const int64_t begin = block.row * width, end = begin + block.rows * width;
                for (int64_t i = begin; i < end; i += LANES)
                    store(to + i, load(to + i) * load(before.slope + i));
                if (!before.scale) return;
                std::copy(to + begin, to + end, normals[(l - 1) % 2] + begin);
                for (int64_t r = block.row; r < block.row + block.rows; ++r) {
                    float *row = to + r * width;
                    for (int64_t j = 0; j < before.out; ++j) row[j] *= before.scale[j];
                    normalize_backward(row, before.normalized + r * width, before.factor[r],
                                       before.out);
                }
            });
            member.wait();
            gradient = to;
            stride = width;
        }
    });
}

// losses.quantile_loss: z [twins, rows, n], y [rows, m] -> of each twin and row the mean over i and j,
// [twins, rows], and its gradient for z. A NaN in z or y comes out in both.
void qvpo_quantile_loss(const float *z, int64_t twins, int64_t rows, int64_t n, const float *y,
                        int64_t m, float *losses, float *gradient) {
    const float share = 1.0f / (n * m);
    for (int64_t row = 0; row < twins * rows; ++row) {
        const float *targets = y + row % rows * m;
        float total = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            const float quantile = z[row * n + i], level = (i + 0.5f) / n;
            const Vector over = broadcast(level), under = broadcast(1.0f - level);
            Vector huber_sum{}, slope_sum{};
            for (int64_t j = 0; j < m; j += LANES) {
                Vector error{};
                if (j + LANES <= m)
                    error = load(targets + j) - quantile;
                else  // an error of zero adds nothing
                    for (int64_t k = j; k < m; ++k) error[k - j] = targets[k] - quantile;
                const Vector slope = error > 1.0f ? broadcast(1.0f)
                                     : error < -1.0f ? broadcast(-1.0f) : error;
                const Vector weighted = (error < 0.0f ? under : over) * slope;
                slope_sum += weighted;
                huber_sum += weighted * (error - 0.5f * slope);
            }
            float slope = 0.0f;
            for (int lane = 0; lane < LANES; ++lane) {
                total += huber_sum[lane];
                slope += slope_sum[lane];
            }
            gradient[row * n + i] = -slope * share;
        }
        losses[row] = total * share;
    }
}
}
