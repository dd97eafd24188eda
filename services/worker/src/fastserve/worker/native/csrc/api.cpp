// The C interface, as library.py declares it. Nothing may be thrown across it.

#include <sys/eventfd.h>

#include <exception>
#include <string>

#include "copy.h"
#include "model.h"

using namespace fastserve;

namespace {

thread_local std::string failure;

// What `action` returns; `otherwise` if it throws, and then fs_failure() says why.
template <class Action, class Result>
Result guarded(const Action& action, Result otherwise) {
    try {
        return action();
    } catch (const std::exception& error) {
        failure = error.what();
        return otherwise;
    }
}

}  // namespace

extern "C" {

const char* fs_failure() { return failure.c_str(); }

Model* fs_model_new(const Shape* shape) {
    return guarded([&] { return new Model(*shape); }, static_cast<Model*>(nullptr));
}

void fs_model_free(Model* model) { delete model; }

int fs_model_matrix(Model* model, int layer, Weight which, int outputs, int inputs,
                    const float* weight, const float* bias) {
    return guarded(
        [&] {
            model->set_matrix(layer, which, outputs, inputs, weight, bias);
            return 0;
        },
        -1);
}

int fs_model_vector(Model* model, int layer, Weight which, int size, const float* values) {
    return guarded(
        [&] {
            model->set_vector(layer, which, size, values);
            return 0;
        },
        -1);
}

void fs_model_embedding(Model* model, Dtype dtype, const void* rows) {
    model->set_embedding(dtype, rows);
}

void fs_model_rope(Model* model, const float* cos, const float* sin) { model->set_rope(cos, sin); }

int fs_model_forward(Model* model, const Batch* batch) {
    return guarded(
        [&] {
            if (batch->bell >= 0) (void)eventfd_write(batch->bell, 1);  // fails if it rings already
            model->forward(*batch);
            return 0;
        },
        -1);
}

void fs_copy(void* to, const void* from, size_t bytes) {
    copy(static_cast<char*>(to), static_cast<const char*>(from), bytes);
}

}  // extern "C"
