/* Stage 2 on a CPU, compiled: what host.py does in torch and NumPy where this was not built.

Pairs are those i < j in row order, as SciPy's pdist has them. Plain C without Python's API, called through ctypes.

The threads are torch's own, whose Linux builds use GCC's OpenMP. Another pool would compete with torch's threads, which
spin for milliseconds after each operator: with Clang's OpenMP, eight images take longer than in NumPy. */

#if !defined(__GNUC__) || defined(__clang__)
#error "only GCC shares its OpenMP threads with torch"
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A build for x86-64 runs on every one and takes the widest vectors there are; elsewhere the compiler's own target
   serves. Not for functions with OpenMP: the compiler moves their loops out of the versions. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_CPU(...) __attribute__((target_clones(__VA_ARGS__, "default")))
#else
#define FOR_EACH_CPU(...)
#endif

enum {
    ROWS = 4, COLUMNS = 16, /* of a tile: its sums stay in registers, twice as many would not */
    LINE = 64,              /* bytes that the memory is read in */
    TERMS = 64,             /* of a partial sum: one sum over everything would round more the longer it is */
    BLOCK = 1 << 20,        /* values counted in 32 bits */
    SAMPLE = 2048           /* size of the sample that brackets an order statistic; so few are selected from directly */
};

/* Distances as they are ordered: of non-negative floats the bits are, and NaN comes last. */
typedef int32_t __attribute__((may_alias)) bits;

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Distances of the pairs of ROWS rows from the top-th on. strips are the rows, transposed COLUMNS at a time. */
FOR_EACH_CPU("avx512f", "fma")
static void distances_of_rows(const float *rows, const float *strips, ptrdiff_t n, ptrdiff_t length, ptrdiff_t top,
                              float *distances)
{
    const float *row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = rows + smaller(top + r, n - 1) * length;
    for (ptrdiff_t left = top / COLUMNS * COLUMNS; left < n; left += COLUMNS) {
        const float *strip = strips + left * length;
        float sums[ROWS][COLUMNS] = {{0}};
        for (ptrdiff_t start = 0; start < length; start += TERMS) {
            ptrdiff_t end = smaller(start + TERMS, length);
            float part[ROWS][COLUMNS] = {{0}};
            for (ptrdiff_t d = start; d < end; d++)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 1
                    for (int c = 0; c < COLUMNS; c++) {
                        float difference = row[r][d] - strip[d * COLUMNS + c];
                        part[r][c] += difference * difference;
                    }
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) sums[r][c] += part[r][c];
        }
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = fabsf(sqrtf(sums[r][c])); /* no NaN with a sign */
        for (ptrdiff_t i = top; i < smaller(top + ROWS, n); i++) {
            ptrdiff_t first = left > i ? left : i + 1, last = smaller(left + COLUMNS, n);
            float *to = distances + i * (2 * n - i - 1) / 2 + first - i - 1;
            const float *from = &sums[i - top][first - left];
            if (last - first == COLUMNS) memcpy(to, from, COLUMNS * sizeof(float)); /* of known size: no call */
            else if (last > first) memcpy(to, from, (last - first) * sizeof(float));
        }
    }
}

/* Euclidean distances by direct differences: equal rows are at exactly 0. rows is (n, length), distances
   (n * (n - 1) / 2). Returns 0, or -1 without memory. */
int pairwise_distances(const float *rows, ptrdiff_t n, ptrdiff_t length, float *distances)
{
    /* A row of a strip is a line of the memory. The last strip is filled up with zeros. */
    ptrdiff_t n_strips = (n + COLUMNS - 1) / COLUMNS;
    float *strips = aligned_alloc(LINE, (n_strips + 1) * length * COLUMNS * sizeof(float));
    if (!strips) return -1;
    for (ptrdiff_t s = 0; s < n_strips; s++)
        for (ptrdiff_t d = 0; d < length; d++)
            for (ptrdiff_t c = 0; c < COLUMNS; c++) {
                ptrdiff_t i = s * COLUMNS + c;
                strips[(s * length + d) * COLUMNS + c] = i < n ? rows[i * length + d] : 0;
            }
    /* One image is one thread's. Behind a network two take longer, twice the time for 512 channels: the other has to
       wake, and what it writes has to come from its cache. */
    for (ptrdiff_t top = 0; top < n; top += ROWS) distances_of_rows(rows, strips, n, length, top, distances);
    free(strips);
    return 0;
}

/* The k-th smallest of a few values, counted from 0; reorders them (Hoare's quickselect). */
static int32_t select_from_few(bits *values, ptrdiff_t n, ptrdiff_t k)
{
    uint64_t random = 1;
    for (ptrdiff_t left = 0, right = n - 1; left < right;) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        ptrdiff_t chosen = left + (ptrdiff_t)((random >> 33) % (uint64_t)(right - left + 1));
        int32_t pivot = values[chosen];
        values[chosen] = values[left];
        values[left] = pivot;
        ptrdiff_t i = left - 1, j = right + 1;
        for (;;) {
            while (values[++i] < pivot) {}
            while (values[--j] > pivot) {}
            if (i >= j) break;
            int32_t kept = values[i];
            values[i] = values[j];
            values[j] = kept;
        }
        if (k <= j) right = j;
        else left = j + 1;
    }
    return values[k];
}

/* How many values are at most this. */
static inline ptrdiff_t count(const bits *values, ptrdiff_t n, int32_t limit)
{
    ptrdiff_t found = 0;
    for (ptrdiff_t start = 0; start < n; start += BLOCK) {
        int32_t of_block = 0; /* as wide as the values, so that as many are counted at once */
        for (ptrdiff_t i = start; i < smaller(start + BLOCK, n); i++) of_block += values[i] <= limit;
        found += of_block;
    }
    return found;
}

/* The k-th smallest value, counted from 0. spare has room for all of them; pages it never touches cost nothing. */
FOR_EACH_CPU("avx512f", "avx2")
static int32_t select_from_many(const bits *values, ptrdiff_t n, ptrdiff_t k, bits *spare)
{
    while (n > SAMPLE) {
        /* Two sample values that bracket the k-th about 99 times in 100. */
        bits sample[SAMPLE];
        for (ptrdiff_t s = 0; s < SAMPLE; s++) sample[s] = values[s * n / SAMPLE];
        double share = (double)k / (double)n, margin = 3 * sqrt(share * (1 - share) * SAMPLE) + 1;
        ptrdiff_t first = (ptrdiff_t)(share * SAMPLE - margin), last = (ptrdiff_t)(share * SAMPLE + margin);
        int32_t low = select_from_few(sample, SAMPLE, first > 0 ? first : 0);
        int32_t high = select_from_few(sample, SAMPLE, smaller(last, SAMPLE - 1));
        /* Ties with a bound are dropped, so every round shrinks the set even if all values are equal. */
        int32_t from = 0, to = INT32_MAX;
        ptrdiff_t to_low = count(values, n, low), dropped = 0;
        if (k < to_low) {
            if (k >= count(values, n, low - 1)) return low;
            to = low - 1;
        } else if (k < count(values, n, high - 1)) {
            from = low + 1;
            to = high - 1;
            dropped = to_low;
        } else {
            dropped = count(values, n, high);
            if (k < dropped) return high;
            from = high + 1;
        }
        ptrdiff_t kept = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            int32_t value = values[i];
            spare[kept] = value; /* branch-free: always store, advance only for values in range */
            kept += (uint32_t)value - (uint32_t)from <= (uint32_t)to - (uint32_t)from;
        }
        k -= dropped;
        values = spare;
        n = kept;
    }
    if (values != spare) memcpy(spare, values, n * sizeof(bits));
    return select_from_few(spare, n, k);
}

/* Value of rank k, given the one at or just before it: itself if tied, else the next larger. */
FOR_EACH_CPU("avx512f", "avx2")
static int32_t select_next(const bits *values, ptrdiff_t n, int32_t value, ptrdiff_t k)
{
    if (count(values, n, value) > k) return value;
    uint32_t gap = UINT32_MAX;
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t of_this = (uint32_t)values[i] - (uint32_t)value - 1; /* of those up to value, 2^31 and more */
        gap = of_this < gap ? of_this : gap;
    }
    return (int32_t)((uint32_t)value + 1 + gap);
}

/* eps between the distances of two ranks that are the same or neighbours, at least the floor, and rounded down: rounded
   up it could reach one pair further. As host.py's neighbourhood_radius. */
static float neighbourhood_radius(const float *distances, ptrdiff_t n_pairs, ptrdiff_t low, ptrdiff_t high,
                                  double fraction, double floor, bits *spare)
{
    const bits *values = (const bits *)distances;
    int32_t below_bits = select_from_many(values, n_pairs, low, spare);
    int32_t above_bits = low == high ? below_bits : select_next(values, n_pairs, below_bits, high);
    float below, above;
    memcpy(&below, &below_bits, sizeof below);
    memcpy(&above, &above_bits, sizeof above);
    double eps = (double)below + ((double)above - (double)below) * fraction;
    if (eps < floor) eps = floor;
    float rounded = (float)eps;
    return (double)rounded > eps ? nextafterf(rounded, 0) : rounded;
}

/* DBSCAN's labels of n points, numbered and resolved as scikit-learn does; -1 is noise. A point is its own neighbour.
   Returns 0, or -1 without memory. */
FOR_EACH_CPU("avx512f", "avx2")
int dbscan(const float *distances, ptrdiff_t n, float eps, int32_t min_samples, int32_t *labels)
{
    const int32_t none = INT32_MAX; /* no core, or no cluster: larger than any */
    int32_t *degree = calloc(3 * n + 1, sizeof(int32_t)), *component = degree + n, *lowest = component + n;
    if (!degree) return -1;

    /* row[j - i - 1] is the pair (i, j). */
    const float *row = distances;
    for (ptrdiff_t i = 0; i < n; row += n - ++i) {
        int32_t count = 1;
        for (ptrdiff_t j = i + 1; j < n; j++) {
            int32_t near = row[j - i - 1] <= eps;
            count += near;
            degree[j] += near;
        }
        degree[i] += count;
    }

    /* From the last core on, each joins the component of the first core behind it that it is near to, and so unites it
       with those of the others. Few rows unite any, and one read of a row tells which. */
    int32_t n_components = 0;
    row = distances + n * (n - 1) / 2;
    for (ptrdiff_t i = n - 1; i >= 0; i--) {
        row -= n - 1 - i;
        component[i] = none;
        if (degree[i] < min_samples) continue;
        ptrdiff_t first = i + 1;
        while (first < n && !(row[first - i - 1] <= eps && component[first] != none)) first++;
        if (first == n) {
            component[i] = (int32_t)i;
            n_components++;
            continue;
        }
        int32_t own = component[i] = component[first], unites = 0;
        if (n_components == 1) continue;
        for (ptrdiff_t j = first; j < n; j++)
            unites |= (row[j - i - 1] <= eps) & (component[j] != own) & (component[j] != none);
        for (ptrdiff_t j = first; unites && j < n; j++) {
            int32_t other = component[j];
            if (!(row[j - i - 1] <= eps) || other == own || other == none) continue;
            for (ptrdiff_t k = i; k < n; k++) component[k] = component[k] == other ? own : component[k];
            n_components--;
        }
    }

    /* Clusters are numbered by their first core. */
    int32_t n_clusters = 0, *number = degree;
    for (ptrdiff_t i = 0; i < n; i++) number[i] = lowest[i] = none;
    for (ptrdiff_t i = 0; i < n; i++) {
        int32_t own = component[i];
        if (own != none && number[own] == none) number[own] = n_clusters++;
        labels[i] = own == none ? none : number[own];
    }

    /* A border point joins the lowest-numbered of the clusters whose cores it is near to. */
    row = distances;
    for (ptrdiff_t i = 0; i < n; row += n - ++i) {
        int32_t own = labels[i], least = lowest[i];
        if (own != none)
            for (ptrdiff_t j = i + 1; j < n; j++) {
                int32_t reached = row[j - i - 1] <= eps ? own : none;
                lowest[j] = lowest[j] < reached ? lowest[j] : reached;
            }
        else
            for (ptrdiff_t j = i + 1; j < n; j++) {
                int32_t reached = row[j - i - 1] <= eps ? labels[j] : none;
                least = least < reached ? least : reached;
            }
        lowest[i] = least;
    }
    for (ptrdiff_t i = 0; i < n; i++)
        if (labels[i] == none) labels[i] = lowest[i] == none ? -1 : lowest[i];
    free(degree);
    return 0;
}

/* What an image's clustering depends on, as host.py's PROBLEM: how many channels it has, the ranks of eps and
   its part of the way between them, and how many neighbours make a core. */
struct problem {
    ptrdiff_t n, low, high;
    double fraction;
    int32_t min_samples;
};

/* Labels and eps of one image's channels: of rows (n_channels, length) those with members 1. Fewer than two leave eps
   as it is. */
static int cluster_image(const float *rows, const uint8_t *members, ptrdiff_t n_channels, ptrdiff_t length,
                         struct problem problem, double floor, int32_t *labels, float *eps)
{
    ptrdiff_t n = problem.n, n_pairs = n * (n - 1) / 2;
    float *chosen = malloc(n * length * sizeof(float) + 1), *distances = malloc(n_pairs * sizeof(float) + 1);
    bits *spare = malloc(n_pairs * sizeof(bits) + 1);
    int32_t *found = malloc(n * sizeof(int32_t) + 1);
    int status = chosen && distances && spare && found ? 0 : -1;
    for (ptrdiff_t c = 0, i = 0; !status && c < n_channels; c++)
        if (members[c]) memcpy(chosen + i++ * length, rows + c * length, length * sizeof(float));
    if (!status) status = pairwise_distances(chosen, n, length, distances);
    if (!status && n > 1)
        *eps = neighbourhood_radius(distances, n_pairs, problem.low, problem.high, problem.fraction, floor, spare);
    if (!status) status = dbscan(distances, n, *eps, problem.min_samples, found);
    for (ptrdiff_t c = 0, i = 0; !status && c < n_channels; c++)
        if (members[c]) labels[c] = found[i++];
    free(chosen);
    free(distances);
    free(spare);
    free(found);
    return status;
}

/* Labels and eps of a batch: rows (n_images, n_channels, length), members and labels (n_images, n_channels), problems
   and eps (n_images). Labels of others than members stay as they are. Returns 0, or -1 without memory. */
int cluster_images(const float *rows, const uint8_t *members, ptrdiff_t n_images, ptrdiff_t n_channels,
                   ptrdiff_t length, const struct problem *problems, double floor, int32_t *labels, float *eps)
{
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (n_images > 1)
    for (ptrdiff_t b = 0; b < n_images; b++)
        failed |= cluster_image(rows + b * n_channels * length, members + b * n_channels, n_channels, length,
                                problems[b], floor, labels + b * n_channels, eps + b) != 0;
    return failed ? -1 : 0;
}
