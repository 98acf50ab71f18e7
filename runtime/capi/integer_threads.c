/* Threads of the integer engine, over POSIX threads; elsewhere one thread computes everything. */
#include "integer_threads.h"

#include <stddef.h>

#if !defined(_WIN32)

#include <pthread.h>
#include <stdlib.h>

typedef struct worker {
    tue_int_threads *all;
    int32_t number;
    pthread_t thread;
} worker;

struct tue_int_threads {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    tue_int_part part;
    void *argument;
    int64_t turn; /* how often work was handed out */
    int32_t count, busy, is_closing;
    worker workers[];
};

static void *serve(void *given) {
    worker *me = given;
    tue_int_threads *t = me->all;
    int64_t seen = 0;
    pthread_mutex_lock(&t->lock);
    for (;;) {
        while (t->turn == seen && !t->is_closing) pthread_cond_wait(&t->start, &t->lock);
        if (t->is_closing) break;
        seen = t->turn;
        pthread_mutex_unlock(&t->lock);
        t->part(t->argument, me->number, t->count);
        pthread_mutex_lock(&t->lock);
        if (--t->busy == 0) pthread_cond_signal(&t->done);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

tue_int_threads *tue_int_start_threads(int32_t count) {
    if (count < 2) return NULL;
    tue_int_threads *t = calloc(1, sizeof *t + (size_t)count * sizeof(worker));
    if (!t) return NULL;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->start, NULL);
    pthread_cond_init(&t->done, NULL);
    t->count = 1;
    for (int32_t i = 1; i < count; i++) {
        worker *w = &t->workers[i];
        w->all = t, w->number = i;
        if (pthread_create(&w->thread, NULL, serve, w) != 0) break;
        t->count = i + 1;
    }
    return t;
}

int32_t tue_int_count_threads(const tue_int_threads *threads) { return threads ? threads->count : 1; }

void tue_int_share(tue_int_threads *t, tue_int_part part, void *argument) {
    if (!t || t->count < 2) {
        part(argument, 0, 1);
        return;
    }
    pthread_mutex_lock(&t->lock);
    t->part = part, t->argument = argument, t->busy = t->count - 1, t->turn++;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    part(argument, 0, t->count);
    pthread_mutex_lock(&t->lock);
    while (t->busy) pthread_cond_wait(&t->done, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

void tue_int_stop_threads(tue_int_threads *t) {
    if (!t) return;
    pthread_mutex_lock(&t->lock);
    t->is_closing = 1;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    for (int32_t i = 1; i < t->count; i++) pthread_join(t->workers[i].thread, NULL);
    pthread_cond_destroy(&t->start);
    pthread_cond_destroy(&t->done);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

#else

tue_int_threads *tue_int_start_threads(int32_t count) {
    (void)count;
    return NULL;
}

int32_t tue_int_count_threads(const tue_int_threads *threads) {
    (void)threads;
    return 1;
}

void tue_int_share(tue_int_threads *threads, tue_int_part part, void *argument) {
    (void)threads;
    part(argument, 0, 1);
}

void tue_int_stop_threads(tue_int_threads *threads) { (void)threads; }

#endif
